"""Features that a row of the table may be for; a server checks the rows of those in use."""

from __future__ import annotations

ARGUMENTS = "arguments"
META_INFO = "acceptance in meta_info"
DRAFTING = "drafting"
VERIFYING = "verification"
METRICS = "metrics"
KNOWN_ANSWERS = "known answers"
GRAPHS = "CUDA graphs"
BLOCK_ATTENTION = "attention of blocks"
TRITON = "attention of blocks under the Triton back end"
FLASH_ATTENTION = "attention of blocks under the FlashAttention back end"
FLASHINFER = "attention of blocks under the FlashInfer back end"
ADAPTIVE = "adaptive verification"
ADAPTIVE_GRAPHS = "adaptive verification in CUDA graphs"
ADAPTIVE_RECURRENT = "adaptive verification of a target with recurrent layers"
LORA = "a target with LoRA"
LAST_LAYER = "reading the target's last layer"
OTHER_TARGETS = "a target that SGLang itself does not serve with DFlash"
TOLD_OUTPUTS = "a target that SGLang tells other layers than it keeps"
WEIGHTS = "new weights"
PROMPT_GRAPHS = "CUDA graphs of whole passes over prompts"
VERIFY_STATE = "state of a recurrent target"

# In use in every scheduler process with our worker.
ALWAYS = frozenset({DRAFTING, VERIFYING, METRICS, KNOWN_ANSWERS, GRAPHS, WEIGHTS})
