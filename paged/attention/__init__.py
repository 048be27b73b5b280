"""Paged attention: the same function in several forms, pure tensors, no request in sight."""
