"""The TensorBoard custom-scalars layout."""

from __future__ import annotations

import re


def custom_scalars_layout(prefix: str = "eos") -> dict[str, dict[str, list[str | list[str]]]]:
    """Return the layout for ``SummaryWriter.add_custom_scalars``.

    Args:
        prefix: First part of the log keys.
    """

    def lines(*names: str) -> list[str | list[str]]:
        # Tags are regular expressions: without anchors `eos/edge_ratio` would also draw `eos/edge_ratio_next`.
        return ["Multiline", [f"^{re.escape(prefix)}/{name}$" for name in names]]

    title = "Edge of stability" if prefix == "eos" else f"Edge of stability ({prefix})"
    return {
        title: {
            "edge ratio (1 is the full-batch edge)": lines("edge_ratio", "edge_ratio_clipped", "edge_ratio_next"),
            "normalized sharpness and its threshold": lines("normalized_sharpness", "threshold"),
            "sharpness, and that along minibatch gradients": lines("sharpness", "batch_sharpness"),
            "directional ratio (optimizers without a threshold)": lines("directional_ratio"),
            "verdict (0 warming up, 1 stable, 2 sharpening, 3 edge, 4 restrained, 5 diverging)": lines("verdict"),
            "error of the edge ratio": lines("error"),
            "cost: products per reading": lines("matvecs"),
            "cost: share of the training time": lines("overhead"),
        }
    }
