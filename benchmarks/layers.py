"""What each of the VLM's layers tells the DiT (ParaUni, figures 2, 4 and 5): rewards of pictures
drawn from one layer alone, likeness of the layers' queries, rewards where a range is left out.

One trained model, to which the other layers are silent: of a bridge lim they have no part in the
mean, of scb their hidden states are 0.
"""

from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from benchmarks import About
from benchmarks.geneval import items
from benchmarks.tables import metrics
from common.layouts import all_records
from common.run import fail, replacing
from common.show import spread
from data.shapes.bench import PROMPTS
from rewards import find

ABOUT = About("", "what each layer of the VLM tells the DiT: three figures", 0)


@contextmanager
def heard(model, layers, seen=None):
    """For a while the bridge hears these of its layers alone; seen: a list that gets the queries'
    hidden states of all layers, (all,B,n_query,d)."""
    cfg = model.cfg
    weight = torch.tensor([float(i in layers) for i in cfg.layers])

    def silence(bridge, given, more):
        hidden, lengths, *_ = given
        if seen is not None:
            seen.append(torch.stack([torch.stack([h[b, n - cfg.n_query : n] for b, n in enumerate(
                lengths)]) for h in hidden]).float().cpu())
        if cfg.bridge == "lim":
            return (hidden, lengths, weight * len(weight) / weight.sum()), {}
        part = [h if i in layers else 0 * h for i, h in enumerate(hidden)]
        return (part, lengths), more
    hook = model.bridge.register_forward_pre_hook(silence, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def run(tested, args, out):
    model, layers = tested.model, sorted(set(tested.model.cfg.layers))
    if model.cfg.bridge not in ("lim", "scb") or not out:
        fail("--bench layers needs --out, and a preset whose bridge hears several layers")
    classroom = model.cfg.preset.startswith("shapes")
    rows = [r for _, r, _ in all_records(PROMPTS / "eval.jsonl")] if classroom else items("")
    rows = [rows[i] for i in spread(rows, 16)]
    names = ("geneval", "clip") if classroom else ("clip", "aesthetic", "pickscore")
    thirds = [part.tolist() for part in np.array_split(layers, 3)]
    arms = {f"{i} alone": [i] for i in layers} | {
        "without " + "-".join(map(str, dict.fromkeys((part[0], part[-1])))): [
            i for i in layers if i not in part] for part in thirds
        if 0 < len(part) < len(layers)} | {"all": layers}
    results, seen = {}, []
    for arm, part in arms.items():
        with heard(model, part, seen if arm == "all" else None):
            images = torch.cat([tested.draw([r["prompt"] for r in rows[a : a + 32]], range(
                a, min(a + 32, len(rows)))).cpu() for a in range(0, len(rows), 32)])
        values = zip(*(torch.as_tensor(find(name)(images, rows)).tolist() for name in names))
        results[arm] = metrics([r | dict(zip(names, v)) for r, v in zip(rows, values)],
                               **{name: name for name in names})
    tokens = F.normalize(torch.cat(seen, 1).flatten(1, 2), dim=-1)               # (all,N,d)
    like = torch.einsum("ind,jnd->ij", tokens, tokens) / tokens.shape[1]
    draw_figures(results, names, layers, like, out / "layers.png")
    return results | dict(similarity=like.tolist()), results


def draw_figures(results, names, layers, like, png):
    fig, axes = plt.subplots(1, len(names) + 1, figsize=(4 * len(names) + 4, 3.5))
    for ax, name in zip(axes, names):
        arms = [*results]
        ax.bar(arms, [results[a][name] for a in arms], yerr=[
            results[a][f"{name}_se"] for a in arms],
               color=["C0" if "alone" in a else "C1" if "without" in a else "C2" for a in arms])
        ax.tick_params("x", rotation=90)
        ax.set(title=name, xlabel="layers that the DiT hears")
    shown = axes[-1].imshow(like, vmin=0, vmax=1)
    axes[-1].set(title="likeness of the queries", xlabel="layer", ylabel="layer")
    fig.colorbar(shown, ax=axes[-1])
    fig.tight_layout()
    with replacing(png) as fresh:
        fig.savefig(fresh, dpi=100, format="png")
    plt.close(fig)
