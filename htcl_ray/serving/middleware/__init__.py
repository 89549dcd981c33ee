"""ASGI middleware: request checks, client identity, and admission control."""
