"""The operations of the dialect, one module per kind; importing this package fills the table."""

from tersor.ir.opset import attention, elementwise, layout, nn, quantization, reduction, spatial

__all__ = ["attention", "elementwise", "layout", "nn", "quantization", "reduction", "spatial"]
