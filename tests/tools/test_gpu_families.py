"""The tiny targets of a GPU have weights for all that an engine makes of their configuration."""

from __future__ import annotations

import pytest

from tests.helpers.families import FAMILIES
from tests.helpers.gpu_families import CHANGES, SHOWN, SIZES, sized_target

WITH_EXPERTS = [one for one in FAMILIES if one.name in SHOWN and "experts" in one.trait]


@pytest.mark.parametrize("family", WITH_EXPERTS, ids=lambda family: family.name)
def test_a_shared_experts_width_goes_with_its_weights(family):
    target = sized_target(family, SIZES, CHANGES.get(family.name, {}))
    has_width = hasattr(target.config.get_text_config(), "shared_expert_intermediate_size")
    names = [name for name, _ in target.named_parameters()]
    assert any(".shared_expert." in name for name in names) == has_width
