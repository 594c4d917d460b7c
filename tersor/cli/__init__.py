"""The command line: `tersor compile`, `run`, `bench`, ... (`tersor --help`)."""
