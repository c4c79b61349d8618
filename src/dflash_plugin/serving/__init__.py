"""What the engine adapters share: preparing, loading, checking and watching a drafter."""

# The plugin's key in engine configurations and in a server's own description.
KEY = "dflash_plugin"
