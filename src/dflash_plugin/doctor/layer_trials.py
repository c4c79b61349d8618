"""Target layers that may have been meant: all ids shifted, one id off, another order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path

from dflash_plugin.doctor.trials import Search, Setting, Trials, Tried
from dflash_plugin.drafter.config import DrafterConfig, spread_layers

# Layers that every single id is tried at, besides its neighbors.
COARSE = 8


def shifted(config: DrafterConfig, num_layers: int) -> list[tuple[int, ...]]:
    """Target layer ids that may have been meant: each one lower, each one higher, the default."""
    ids = config.target_layer_ids
    found = [tuple(i + step for i in ids) for step in (-1, 1)]
    if num_layers > 4 and len(ids) > 1:
        found.append(spread_layers(num_layers, len(ids)))
    return [each for each in found if _valid(each, num_layers)]


def _valid(ids: Sequence[int], num_layers: int) -> bool:
    return min(ids) >= -1 and max(ids) < num_layers and len(set(ids)) == len(ids)


def one_moved(
    ids: tuple[int, ...], layers: Sequence[int], num_layers: int
) -> list[tuple[int, ...]]:
    """Ids with a single one moved to each of ``layers``."""
    found = [
        (*ids[:index], layer, *ids[index + 1 :]) for index in range(len(ids)) for layer in layers
    ]
    return [each for each in found if _valid(each, num_layers)]


def neighbors(ids: tuple[int, ...], num_layers: int) -> list[tuple[int, ...]]:
    """Ids with a single one that is one lower or one higher."""
    found = [
        (*ids[:index], ids[index] + step, *ids[index + 1 :])
        for index in range(len(ids))
        for step in (-1, 1)
    ]
    return [each for each in found if _valid(each, num_layers)]


def coarse_layers(num_layers: int) -> list[int]:
    """Layers all over the target."""
    return list(range(0, num_layers, max(1, num_layers // COARSE)))


def orders(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders in which the features may have been meant: all of up to three, else likely ones."""
    if len(ids) <= 3:
        return list(permutations(ids))
    found = [tuple(sorted(ids)), tuple(reversed(ids))]
    found += [(*ids[first:], *ids[:first]) for first in range(1, len(ids))]
    for one, other in combinations(range(len(ids)), 2):
        swapped = list(ids)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        found.append(tuple(swapped))
    return found


def search_layers(trials: Trials, directory: Path) -> Search:
    """Target layers one too low or too high, and single ids anywhere."""
    config = trials.drafter.config
    ids = config.target_layer_ids
    num_layers = trials.texts.target.config.get_text_config().num_hidden_layers
    step = max(1, num_layers // COARSE)

    def finer(tried: Sequence[Tried]) -> list[Setting]:
        """Layers around the best one of the coarse search."""
        gains = [each for each in tried if each.compared is not None and each.compared.gain > 0]
        if not gains:
            return []
        best = max(gains, key=lambda each: each.compared.gain if each.compared else 0.0)
        moved = best.setting.config.target_layer_ids
        near = [
            (*moved[:index], layer + off, *moved[index + 1 :])
            for index, layer in enumerate(moved)
            if layer != ids[index]
            for off in range(1 - step, step)
        ]
        if sum(a != b for a, b in zip(moved, ids, strict=True)) > 1:
            near = []
        return [_with_layers(config, each, directory) for each in near if _valid(each, num_layers)]

    settings = [_with_layers(config, each, directory, 0) for each in shifted(config, num_layers)]
    single = neighbors(ids, num_layers)
    looked_at = (
        f"target layers {list(ids)} against every id one lower and one higher, the default spread "
        "and single ids one off"
    )
    blind = []
    if trials.known is None or trials.by_record:
        blind = ["several ids that are off by different steps"]
        single += one_moved(ids, coarse_layers(num_layers), num_layers)
        looked_at += f", and single ids at every {step}. layer and around the best of these"
    settings += [_with_layers(config, each, directory) for each in single]
    return Search(
        "target layers",
        looked_at,
        settings,
        str(list(ids)),
        finer,
        blind,
    )


def search_order(trials: Trials, directory: Path) -> Search:
    """Features in another order than ``fc`` expects."""
    config = trials.drafter.config
    return Search(
        "feature order",
        f"the order {list(config.target_layer_ids)} in which fc reads features, against others",
        [_with_layers(config, ids, directory) for ids in orders(config.target_layer_ids)],
        f"as {list(config.target_layer_ids)}",
    )


def _with_layers(
    config: DrafterConfig, ids: tuple[int, ...], directory: Path, rank: int = 1
) -> Setting:
    written = [i + 1 for i in ids] if config.dialect == "speculators" else list(ids)
    key = "aux_hidden_state_layer_ids" if config.dialect == "speculators" else "target_layer_ids"
    return Setting(
        f"reading target layers {list(ids)} instead of {list(config.target_layer_ids)}",
        config.model_copy(update={"target_layer_ids": ids}),
        f"set {key} to {written} in {directory / 'config.json'}",
        rank,
    )
