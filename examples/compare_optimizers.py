"""Compare the optimizers on a smoothed loss with SGD on scikit-learn's digits: a table and its picture.

Run it with ``python examples/compare_optimizers.py``: minutes on a CPU. It needs scikit-learn; the picture, matplotlib.
"""

from pathlib import Path

import torch

from eos_monitor.lab.compare_optimizers import compare_optimizers, comparison_figure, comparison_table


def main(seeds: int = 16, epochs: int = 30, folder: Path = Path()) -> str:
    torch.set_num_threads(1)  # the net is tiny: a second thread only waits
    compared = compare_optimizers(seeds=range(seeds), epochs=epochs)
    table = comparison_table(compared)
    print(table)
    try:
        print(f"Picture: {comparison_figure(compared, folder / 'compare_optimizers.png')}")
    except ModuleNotFoundError:
        print("No picture: it needs matplotlib.")
    return table


if __name__ == "__main__":
    main()
