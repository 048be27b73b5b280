"""The oracle: hand it any paged attention kernel; it says that it is right, or names the token it got wrong."""
