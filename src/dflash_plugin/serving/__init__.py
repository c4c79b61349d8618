"""What the engine adapters share: a hosted drafter, its start-up check and its acceptance."""

# The plugin's entry in configurations, and in what a server tells of itself.
KEY = "dflash_plugin"
