"""A second source of truth: a small model of what must hold for every job, and drivers that try to break it."""
