"""Which worker renders what next: decisions and messages, pure."""
