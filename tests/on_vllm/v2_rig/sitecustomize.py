"""Runs vLLM's V2 model runner and its Triton kernels on a CPU, under Triton's interpreter.

Put this folder on PYTHONPATH and set VLLM_V2_ON_CPU=1. Slow (a few tokens/s for a 135M model), but
every kernel and every line of the V2 speculators runs. Not covered: CUDA graphs, streams, real code
generation.

Adaptive verification wants full CUDA graphs: what asks for them is set aside, and the runner takes
its batches as they come.
"""

import os

if os.environ.get("VLLM_V2_ON_CPU"):
    os.environ["TRITON_INTERPRET"] = "1"

    import numpy as np
    import torch
    import triton.backends
    import triton.language as tl
    import triton.language.extra.libdevice as libdevice
    from triton.backends.driver import DriverBase
    from triton.runtime import driver, interpreter

    from dflash_plugin.serving.after_import import after_import

    class CpuDriver(DriverBase):
        """vLLM believes in Triton only where a back end is active."""

        def __init__(self):
            pass

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_current_target(self):
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=None):
            return 0

        def get_benchmarker(self):
            from triton.testing import do_bench

            return do_bench

        def get_device_interface(self):
            return torch.cpu

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=None, driver=CpuDriver)
    driver.set_active(CpuDriver())

    def _with_boolean_mask(name: str, mask_index: int) -> None:
        """The interpreter refuses integer masks, which the GPU accepts."""
        original = getattr(interpreter.InterpreterBuilder, name)

        def call(self, *args, **kwargs):
            args = list(args)
            mask = args[mask_index]
            if isinstance(mask, interpreter.TensorHandle) and mask.data.dtype != np.bool_:
                args[mask_index] = interpreter.TensorHandle(
                    mask.data.astype(bool), interpreter.tl.int1
                )
            return original(self, *args, **kwargs)

        setattr(interpreter.InterpreterBuilder, name, call)

    _with_boolean_mask("create_masked_load", 1)
    _with_boolean_mask("create_masked_store", 2)

    def _sort_for_top_k(module):
        """vLLM's kernel for top-k and top-p counts in Python's integers when interpreted."""
        module.HAS_TRITON = False

    def _adapt_without_graphs(module):
        module.resolve_adaptive_cudagraph_mode = lambda mode, **_: mode
        module.maybe_create_adaptive_verification_manager = _manager_without_streams

    def _manager_without_streams(*, enable_adaptive_verification, num_bonus_tokens, **_):
        """What the plugin calls on vLLM's manager, whose constructor wants CUDA streams."""
        if not enable_adaptive_verification:
            return None
        from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

        manager = object.__new__(AdaptiveVerificationManager)
        manager.num_bonus_tokens = num_bonus_tokens
        return manager

    def _allow_adapting(module):
        module.VllmConfig._validate_adaptive_verification = lambda self: None

    after_import("vllm.v1.worker.gpu.spec_decode.adaptive_verification", _adapt_without_graphs)
    after_import("vllm.config.vllm", _allow_adapting)
    after_import("vllm.v1.sample.ops.topk_topp_sampler", _sort_for_top_k)
    # External functions return None under the interpreter.
    libdevice.log1p = lambda x, **kwargs: tl.log(x + 1.0)
