"""ASGI middleware: admission, rate limits, and checks of requests before routing."""
