"""Names under which vLLM finds this project's draft model and loader."""

ARCHITECTURE = "DFlashPluginDraftModel"
LOAD_FORMAT = "dflash_plugin"
# The value of "rejection_sample_method" that verifies blocks whole.
BLOCK = "block"
