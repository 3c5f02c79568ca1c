"""A combination that is refused, and the loop over a table of them.

Each row is checked on the parsed arguments, before any process group exists, and again on the
``TransformerConfig`` when a model is built, for callers that use no command line. Megatron gives a
setting the same name in both; a name that one side lacks reads as None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Setting = Callable[[str], Any]


@dataclass(frozen=True)
class Constraint:
    """A refused pair: what is set, why it cannot work with the feature, and what to do."""

    flag: str
    violated: Callable[[Setting], bool]
    reason: str
    remedy: str


@dataclass(frozen=True)
class Refusals:
    """All that one feature cannot be combined with.

    Args:
        feature: the flag that asks for it; ``{}`` stands for its value.
        otherwise: how to do without it.
        rows: in the order in which they are checked.
        values: of the flag, where it has others that are not concerned.
    """

    feature: str
    otherwise: str
    rows: tuple[Constraint, ...]
    values: tuple[str, ...] = ()

    def check(self, settings: object, value: str = '') -> None:
        """Raise ValueError for the first row that ``settings`` violates.

        Args:
            settings: parsed arguments or a ``TransformerConfig``.
            value: of the feature's flag.
        """
        for row in self.rows:
            if row.violated(lambda name: getattr(settings, name, None)):
                raise ValueError(
                    f'{row.flag} cannot be combined with {self.feature.format(value)}: '
                    f'{row.reason}; {row.remedy}, or {self.otherwise}'
                )


def cuda_graphs(get: Setting) -> bool:
    """By the names of every release."""
    older = get('enable_cuda_graph') or get('external_cuda_graph')
    return get('cuda_graph_impl') not in (None, 'none') or bool(older)


def captured_parts(get: Setting) -> set[str]:
    """Names of what graphs capture: modules, by the names of every release; empty for all."""
    names = 'cuda_graph_modules', 'cuda_graph_scope', 'cuda_graph_scope_deprecated'
    given = [get(name) for name in names]
    listed = [part for parts in given for part in (parts if isinstance(parts, list) else [parts])]
    return {str(getattr(part, 'name', part)) for part in listed if part is not None}


def graphs_of_layers(get: Setting) -> bool:
    """Whether single layers are captured, rather than a whole iteration."""
    # Core 0.17 has the iteration as a scope, later ones as an implementation.
    iteration = {get('cuda_graph_impl'), *captured_parts(get)}
    return cuda_graphs(get) and 'full_iteration' not in iteration


def offloads(get: Setting) -> bool:
    whole_layers = get('cpu_offloading') or get('cpu_offloading_num_layers')
    return bool(whole_layers or get('fine_grained_activation_offloading'))


def full_recompute(get: Setting) -> bool:
    return bool(get('recompute_granularity') == 'full')


def shards_parameters(get: Setting) -> bool:
    return bool(get('use_megatron_fsdp') or get('use_torch_fsdp2'))


def layer_pattern(get: Setting) -> str | None:
    """The layers of a hybrid model, by either name of the flag; None of another model."""
    return get('hybrid_layer_pattern') or get('hybrid_override_pattern') or None


def hybrid_model(get: Setting) -> bool:
    """The model config says so by another name than the command line."""
    return bool(layer_pattern(get) or get('is_hybrid_model'))


def predicts(get: Setting) -> bool:
    """Whether there are prediction layers: by number, or as parts of a hybrid pattern."""
    predicted = (layer_pattern(get) or '').partition('/')[2]
    return bool(get('mtp_num_layers') or predicted.strip('/'))
