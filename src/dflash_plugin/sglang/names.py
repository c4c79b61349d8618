"""Names under which SGLang finds DFlash and this project's draft model."""

ALGORITHM = "DFLASH"
ARCHITECTURE = "DFlashPluginDraftModel"
# The folder of staged configurations.
ENGINE = "sglang"
