"""The worker: signs and sends the cancels that strategies enqueue, and records what became of each order."""
