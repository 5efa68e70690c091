"""Every method by itself: how it behaves, what it refuses, where it equals another."""
