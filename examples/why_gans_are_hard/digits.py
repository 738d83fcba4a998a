"""Mode collapse on real data: handwritten digits, one recipe that gives one digit, and another that gives all ten.

    python examples/why_gans_are_hard/digits.py --out digits.png

The first lets the generator learn a hundred times as fast as the discriminator, without a penalty; the second is that
of configs/digits.yaml. A classifier that is right on 97 % of digits that it has not seen counts what comes out.
"""

import matplotlib.pyplot as plt
import torch
from shared import arguments, digits, train

from lightning_gan_stability import DigitClassifier, Digits, NonSaturating, R1Penalty, R2Penalty, Relativistic


def main():
    options = arguments(__doc__, steps=3000)
    recipes = {
        "one digit": (digits(options.seed, NonSaturating(), 1e-3, 1e-5), []),
        "ten digits": (digits(options.seed, Relativistic()), [R1Penalty(1.0), R2Penalty(1.0)]),
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), constrained_layout=True)
    classifier = DigitClassifier()
    for (picture, bars), (name, (gan, callbacks)) in zip(axes.T, recipes.items(), strict=True):
        train(gan, Digits(seed=options.seed), options.steps, *callbacks)
        with torch.no_grad():
            samples = gan.eval().sample(1000)
        counts = torch.bincount(classifier.classify(samples).argmax(1), minlength=10)
        held = int((counts >= 30).sum())
        print(f"{name:<11} of 1,000 samples: {counts.tolist()}; {held} digits with 3 % or more")
        rows = samples[:64].reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64)
        picture.imshow(rows, cmap="gray")
        picture.set(title=name, xticks=[], yticks=[])
        bars.bar(range(10), counts)
        bars.axhline(100, color="k", linestyle=":")
        bars.set(xlabel="digit", ylabel="samples of 1,000", xticks=range(10))
    figure.savefig(options.out, dpi=60)


if __name__ == "__main__":
    main()
