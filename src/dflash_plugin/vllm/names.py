"""Names under which vLLM finds this project's draft model and loader."""

ARCHITECTURE = "DFlashPluginDraftModel"
LOAD_FORMAT = "dflash_plugin"
