"""Count the digits that a GAN has learned: trains a classifier on real ones, then classifies 1,000 samples.

    gan-stability fit --config configs/digits.yaml
    python examples/check_digits.py runs/digits/version_0/checkpoints/last.ckpt

The exit code is 0 if every digit makes up at least 3 % of the samples, else 1.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from lightning_gan_stability import GANModule


def train_classifier() -> tuple[SVC, float]:
    """Return a classifier of digits, images flat and in [-1, 1], and its accuracy on a quarter that it did not see."""
    data = load_digits()
    images, held_out, labels, held_out_labels = train_test_split(
        data.data / 8 - 1, data.target, test_size=0.25, stratify=data.target, random_state=0
    )
    classifier = SVC(C=10, gamma=0.02).fit(images, labels)
    return classifier, classifier.score(held_out, held_out_labels)


def draw(checkpoint: str, n: int) -> Tensor:
    """Return n samples of a checkpoint's generator, flat."""
    gan = GANModule.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    with torch.no_grad():
        return gan.sample(n).flatten(1)


def count(checkpoint: str, n: int = 1000) -> tuple[list[int], float]:
    """Return how many of n samples are read as 0, 1, ... 9, and the classifier's accuracy on held-out real digits."""
    classifier, accuracy = train_classifier()
    digits = torch.as_tensor(classifier.predict(draw(checkpoint, n).numpy()))
    return torch.bincount(digits, minlength=10).tolist(), accuracy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint of a run of configs/digits.yaml")
    parser.add_argument("-n", type=int, default=1000, help="number of samples")
    arguments = parser.parse_args()
    counts, accuracy = count(arguments.checkpoint, arguments.n)
    print(f"The classifier reads {accuracy:.1%} of the held-out real digits right.")
    for digit, number in enumerate(counts):
        share = number / arguments.n
        print(f"{digit}  {number:4d}  {share:5.1%}  {'#' * round(200 * share)}")
    found = sum(number > 0 for number in counts)
    print(f"{found} of 10 digits found, the rarest makes up {min(counts) / arguments.n:.1%}.")
    return int(min(counts) < 0.03 * arguments.n)


if __name__ == "__main__":
    raise SystemExit(main())
