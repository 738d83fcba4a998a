"""What the recipes take apart and refuse; that their steps are right, tests/test_recipes.py says."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from toys import trainer

from lightning_gan_stability import (
    Alternating,
    Codec,
    FeatureMatching,
    GANOutputs,
    GeneratorEMA,
    Hinge,
    LeastSquares,
    LogMelSpectrogram,
    PairedTranslation,
    Recipe,
    Reconstruction,
    SuperResolution,
    Tokenizer,
    UnpairedTranslation,
    Vocoder,
)
from lightning_gan_stability.cli import build
from lightning_gan_stability.recipes.codec import normalized


def image(n=4, channels=1, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def wave(n=4, length=64, seed=0):
    return torch.rand(n, 1, length, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class WithLosses(nn.Module):
    """An identity that trains, and returns losses beside its samples."""

    def __init__(self, **losses):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.losses = losses

    def forward(self, x):
        return self.scale * x, {name: value * self.scale for name, value in self.losses.items()}


def judge(channels=1):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))


def both(make):
    return nn.ModuleDict({"a": make(), "b": make()})


def to_image():
    return nn.Conv2d(1, 1, 3, padding=1)


def tokenizer(**kwargs):
    return Tokenizer(WithLosses(codebook=torch.tensor(2.0)), judge(), **kwargs)


def fit(module, data, *callbacks, val=None):
    trainer(max_epochs=1, callbacks=[*callbacks]).fit(module, data, val)
    return module


# ---------- weights and losses


@pytest.mark.parametrize(
    ("recipe", "loss", "d", "g"),
    [
        (tokenizer, Hinge, 0.5, 1.0),
        (lambda **k: Codec(WithLosses(), nn.Conv1d(1, 1, 3), **k), LeastSquares, 2.0, 2.0),
        (lambda **k: Vocoder(WithLosses(), nn.Conv1d(1, 1, 3), **k), LeastSquares, 2.0, 2.0),
        (lambda **k: UnpairedTranslation(both(to_image), both(judge), **k), LeastSquares, 1.0, 2.0),
        (lambda **k: SuperResolution(WithLosses(), judge(), **k), None, 1.0, 0.1),
        (lambda **k: PairedTranslation(to_image(), judge(2), **k), None, 0.5, 1.0),
    ],
)
def test_weights_are_those_of_the_papers_and_can_be_others(recipe, loss, d, g):
    module = recipe()
    assert [module.adversarial_weight(player, None) for player in "dg"] == [d, g]
    assert loss is None or type(module.loss) is loss
    other = recipe(d_weight=3.0, g_weight=0.0)
    assert [other.adversarial_weight(player, None) for player in "dg"] == [3.0, 0.0]


def test_losses_are_weighed_and_those_of_the_discriminator_have_none():
    module = Recipe(WithLosses(), judge(), losses={"codebook": 0.25, "kl": 2.0})
    outputs = GANOutputs(None, None, extras={"codebook": torch.tensor(4.0), "kl": torch.tensor(0.5), "other": None})
    assert module.auxiliary_losses("g", outputs) == {"codebook": 1.0, "kl": 1.0}
    assert module.auxiliary_losses("d", outputs) == {}


@pytest.mark.parametrize(
    ("extras", "got"),
    [
        ({}, r"got extras \[\]\."),
        ({"code": torch.zeros(())}, r"got extras \['code'\]\."),
        ({"codebook": torch.zeros(4)}, r"got a torch.float32 tensor of shape \(4,\)\."),
        ({"codebook": 0.5}, r"got a float\."),
    ],
)
def test_a_loss_that_the_generator_does_not_return(extras, got):
    with pytest.raises(ValueError, match=rf"The generator must return the loss 'codebook' as a scalar tensor, .*{got}"):
        tokenizer().auxiliary_losses("g", GANOutputs(None, None, extras=extras))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"d_weight": -1.0}, "`d_weight` must be"),
        ({"g_weight": "much"}, "`g_weight` must be"),
        ({"losses": ["codebook"]}, "`losses` must be a dict of names and weights"),
        ({"losses": {"codebook": -0.5}}, r"`losses\['codebook'\]` must be"),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokenizer(**options)


# ---------- batches


def test_a_tokenizer_reads_what_it_reconstructs():
    for batch in (image(), (image(),), (image(), torch.arange(4)), {"image": image(), "label": torch.arange(4)}):
        real, condition = tokenizer().unpack(batch)
        assert torch.equal(real, image())
        assert condition is real


@pytest.mark.parametrize("kind", [PairedTranslation, Vocoder, SuperResolution])
@pytest.mark.parametrize("form", ["source", (), {"source": 0}, {"target": 0}, (0, None), {}])
def test_a_target_that_is_missing(kind, form):
    """In validation as in training, and without a look at the user's data."""
    networks = (to_image(), judge(2)) if kind is PairedTranslation else (WithLosses(), judge())
    batch = image() if form == "source" else form
    with pytest.raises(ValueError, match=rf"A batch of {kind.__name__}.* must be \(source, target\) or .*, in valid"):
        kind(*networks).unpack(batch)


def test_validation_without_targets_is_refused_and_predicting_is_not():
    module = PairedTranslation(to_image(), judge(2))
    pairs = DataLoader([(image(1)[0], image(1, seed=1)[0])] * 8, batch_size=4)
    sources = DataLoader(image(8), batch_size=4)
    with pytest.raises(ValueError, match="A batch of PairedTranslation must be"):
        fit(module, pairs, val=sources)
    assert len(trainer().predict(module, sources)) == 2


@pytest.mark.parametrize(
    ("source", "target"),
    [(image(size=8), image(size=4)), (image(size=8), torch.zeros(4, 8, 8)), (image(size=8), [1, 2])],
)
def test_pairs_of_several_sizes(source, target):
    with pytest.raises(ValueError, match=r"needs sources and targets \(n, c, h, w\) of one height and width, got a ta"):
        PairedTranslation(to_image(), judge(2)).unpack((source, target))


def test_the_discriminator_of_pairs_sees_source_and_image():
    seen = []
    module = PairedTranslation(to_image(), judge(2))
    module.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.logits(image(seed=1), image())
    assert torch.equal(seen[0], torch.cat([image(), image(seed=1)], 1))


@pytest.mark.parametrize("size", [7, (8, 6), 2])
def test_images_that_cannot_be_made_smaller(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    module = SuperResolution(WithLosses(), judge(), scale=4)
    with pytest.raises(ValueError, match=r"Images must be \(n, c, h, w\), with h and w multiples of `scale` 4, got"):
        module.unpack(torch.zeros(2, 3, height, width))


def test_small_images_are_means_of_the_large_ones():
    """Of constant images, and of what is smooth at the scale."""
    module = SuperResolution(WithLosses(), judge(), scale=4)
    line = torch.linspace(-1, 1, 64)[None, None, None].expand(2, 3, 64, -1)
    large, small = module.unpack([line])
    assert torch.equal(large, line)
    torch.testing.assert_close(
        small[:, :, 2:-2, 2:-2], nn.functional.avg_pool2d(line, 4)[:, :, 2:-2, 2:-2], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("batch", [torch.zeros(4, 64), torch.zeros(4, 1, 64).int(), torch.zeros(64)])
@pytest.mark.parametrize("kind", [Codec, Vocoder])
def test_what_is_no_waveform(kind, batch):
    module = Codec(WithLosses(), judge()) if kind is Codec else Vocoder(WithLosses(), judge(), nn.Identity())
    with pytest.raises(ValueError, match=r"Waveforms must be a floating tensor \(n, channels, t\) in \[-1, 1\], got"):
        module.unpack(batch)


def test_a_vocoder_makes_spectrograms_or_takes_them():
    spectrogram = LogMelSpectrogram(8000, 16, n_mels=4)
    module = Vocoder(WithLosses(), nn.Conv1d(1, 1, 3), spectrogram)
    for batch in (wave(), [wave()]):
        real, condition = module.unpack(batch)
        assert torch.equal(real, wave())
        assert torch.equal(condition, spectrogram(wave()))
    mel = torch.rand(4, 4, 16)
    assert torch.equal(module.unpack((mel, wave()))[1], mel)
    assert torch.equal(module.unpack({"source": mel, "target": wave()})[0], wave())


def test_codecs_are_judged_at_one_loudness():
    seen = []
    module = Codec(WithLosses(), nn.Conv1d(1, 1, 3))
    module.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = 0.1 * wave() + 0.05
    module.logits(x)
    assert seen[0].mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(seen[0].abs().amax(-1), torch.full((4, 1), 0.8), rtol=0, atol=1e-6)
    assert torch.isfinite(normalized(torch.zeros(2, 1, 8))).all()
    plain = Codec(WithLosses(), nn.Conv1d(1, 1, 3), normalize=False)
    plain.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    plain.logits(x)
    assert torch.equal(seen[1], x)


# ---------- two domains


def test_both_domains_in_any_form():
    module = UnpairedTranslation(both(to_image), both(judge))
    a, b = image(), image(seed=1)
    for batch in ({"a": a, "b": b}, (a, b), [a, b], {"a": (a, torch.arange(4)), "b": [b]}):
        real, condition = module.unpack(batch)
        assert torch.equal(real["a"], a)
        assert torch.equal(real["b"], b)
        assert condition is real


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (image(), r"must be \{'a': images, 'b': images\} or a tuple of both"),
        ({"a": image()}, r"must be \{'a': images, 'b': images\} or a tuple of both"),
        ({"a": image(), "b": image(3)}, "as many of each"),
        ({"a": image(), "b": torch.zeros(4)}, "as many of each"),
        ((image(), None), "as many of each"),
    ],
)
def test_batches_that_are_not_of_two_domains(batch, sentence):
    with pytest.raises(ValueError, match=sentence):
        UnpairedTranslation(both(to_image), both(judge)).unpack(batch)


@pytest.mark.parametrize("networks", [(to_image(), both(judge)), (both(to_image), nn.ModuleDict({"a": judge()}))])
def test_networks_that_are_not_of_two_domains(networks):
    with pytest.raises(ValueError, match="must be a ModuleDict of 'a' and 'b'"):
        UnpairedTranslation(*networks)


def test_translation_has_two_directions_by_the_average():
    module = UnpairedTranslation(both(to_image), both(judge))
    loaders = {d: DataLoader(image(8, seed=i), batch_size=4) for i, d in enumerate("ab")}
    data = CombinedLoader(loaders, "max_size_cycle")
    fit(module, data, GeneratorEMA(decay=0.5), Alternating(share_fake=True))
    assert module.plan == ("g", "d")
    module.eval()
    for domain in "ab":
        expected = module.generator_ema[domain](image())
        assert torch.equal(module.translate(image(), domain), expected)
        assert not torch.equal(module.generator[domain](image()), expected)
    with pytest.raises(ValueError, match="has two directions: use `translate"):
        module(image())
    with pytest.raises(ValueError, match="`to` must be"):
        module.translate(image(), "c")


def test_without_identities_domains_may_have_other_channels():
    generators = nn.ModuleDict({"a": nn.Conv2d(3, 1, 1), "b": nn.Conv2d(1, 3, 1)})
    discriminators = nn.ModuleDict({"a": judge(), "b": judge(3)})
    module = UnpairedTranslation(generators, discriminators, identity=False)
    sample, extras = module.generate(module.generator, 4, {"a": image(), "b": image(channels=3)}, None)
    assert {domain: x.shape[1] for domain, x in sample.items()} == {"a": 1, "b": 3}
    assert extras.keys() == {"cycle"}


def test_features_of_two_domains_can_be_matched():
    module = UnpairedTranslation(both(to_image), both(judge))
    loaders = {d: DataLoader(image(8, seed=i), batch_size=4) for i, d in enumerate("ab")}
    fit(module, CombinedLoader(loaders, "max_size_cycle"), FeatureMatching(layers=["*.0"]))
    assert module.last_step.terms["g"]["feature_matching"] > 0


# ---------- together


def test_a_checkpoint_keeps_the_weights(tmp_path):
    module = tokenizer(g_weight=0.25, losses={"codebook": 3.0})
    run = trainer(max_steps=1, callbacks=[Reconstruction()])
    run.fit(module, DataLoader(image(8), batch_size=4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    networks = {"generator": WithLosses(codebook=torch.tensor(2.0)), "discriminator": judge()}
    loaded = Tokenizer.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, **networks)
    assert loaded.weights == {"d": 0.5, "g": 0.25}
    assert loaded.extra_weights == {"codebook": 3.0}
    assert torch.equal(loaded.generator.scale, module.generator.scale)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_what_a_config_describes_can_be_built(tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    file = tmp_path / "ring.yaml"
    file.write_text(
        "model: {generator: {class_path: MLP, init_args: {sizes: [4, 2]}}, "
        "discriminator: {class_path: MLP, init_args: {sizes: [2, 1]}}, latent_dim: 4}\n"
        "data: Ring\ntrainer: {max_steps: 2, accelerator: cpu, logger: false, enable_checkpointing: false}\n"
    )
    cli = build(["--config", str(file)])
    assert cli.trainer.global_step == 0
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.model.iteration == 2
    assert not (Path.cwd() / "config.yaml").exists()
    assert "columns" not in cli.model.hparams


def test_predictions_of_lone_targets_are_those_of_validation():
    torch.manual_seed(0)
    enlarge = SuperResolution(nn.Upsample(scale_factor=2), judge(), scale=2)
    large = image(4)
    small = enlarge.degrade(large)
    expected = nn.functional.interpolate(small, scale_factor=2)
    labels = torch.arange(4)
    for batch in large, [large], (large, labels), {"source": small}, (small, large):
        [made] = trainer().predict(enlarge, DataLoader([batch], batch_size=None))
        torch.testing.assert_close(made, expected)
    assert enlarge.unpack((large, labels))[1].shape == small.shape
    speak = Vocoder(nn.Conv1d(4, 1, 1), judge(), spectrogram=nn.Conv1d(1, 4, 1))
    sound = wave()
    mel = speak.spectrogram(sound).detach()
    for batch in sound, mel, {"source": mel}, (mel, ["a.wav", "b.wav", "c.wav", "d.wav"]):
        [made] = trainer().predict(speak, DataLoader([batch], batch_size=None))
        torch.testing.assert_close(made, speak.generator(mel).detach())


def test_predictions_of_one_domain_are_refused():
    networks = [nn.ModuleDict({d: nn.Conv2d(1, 1, 3, padding=p) for d in "ab"}) for p in (1, 0)]
    with pytest.raises(ValueError, match=r"of one domain does not say which: give `trainer.predict` batches"):
        trainer().predict(UnpairedTranslation(*networks), DataLoader([image(2)], batch_size=None))
