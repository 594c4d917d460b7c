"""The operations of the dialect, one module per kind; importing this package fills the table."""

from tersor.ir.opset import elementwise, layout, nn, quantization, reduction, spatial

__all__ = ["elementwise", "layout", "nn", "quantization", "reduction", "spatial"]
