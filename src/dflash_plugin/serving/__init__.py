"""What the engine adapters share: a hosted drafter, its start-up check and its acceptance."""
