"""Recall over context length, with one instance's own memory marked."""

from pathlib import Path


def plot_recall(by_length: dict[int, float], own_tokens: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(list(by_length), list(by_length.values()), marker="o", label="passkey recall")
    axes.axvline(own_tokens, linestyle="--", color="gray", label=f"one instance's own memory ({own_tokens} tokens)")
    axes.axvspan(own_tokens, max(by_length), alpha=0.1, label="context that borrows")
    axes.set(xlabel="context length (tokens)", ylabel="recall", ylim=(-0.05, 1.05))
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
