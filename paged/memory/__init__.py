"""What every byte of the pool is doing, step by step, and the pictures of it."""
