"""``moe-posterior cache``."""

import argparse

HELP = """
Run a backbone once over the training, validation and test rows of a data module and store its features in half precision, so that
gates and experts train on them in seconds. Read them with the data module CachedFeatures.

The folder's manifest.json records which data and which network the features come from. Run the same command again to resume after an
interruption; with other data, another network or other weights the folder is refused, and the message says what differs.
"""
EXAMPLES = """
examples:
  moe-posterior cache --data Digits --backbone moe_posterior.training.backbones.DigitsNet --out caches/digits
                                                                         scikit-learn's digits, an untrained network, seconds
  moe-posterior cache --data PACS --data.inputs pixels --data.held_out photo \\
      --backbone moe_posterior.training.backbones.ResNet --weights net.pt --out caches/photo
  moe-posterior cache --data data.yaml --backbone net.yaml --weights runs/demo/softmax/checkpoints/last.ckpt \\
      --prefix backbone. --shifts contrast pixelate --severities 1 3 5 --out caches/trained
                                                                         YAML files hold class_path and init_args

and then, in an experiment file:
  data:
    class_path: moe_posterior.training.data.CachedFeatures
    init_args: {folder: caches/digits}
  model:
    backbone:
      class_path: moe_posterior.training.data.features.PassThrough
      init_args: {out_features: 64}
"""


def parser() -> argparse.ArgumentParser:
    """The command line as its help shows it; the real parser also knows the options of the chosen classes."""
    made = argparse.ArgumentParser(
        "moe-posterior cache", description=HELP, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--data", metavar="CLASS", help="data module, or a YAML file of it; --data.help CLASS names its options"
    )
    made.add_argument(
        "--backbone", metavar="CLASS", help="network from inputs to (N, F), or a YAML file; --backbone.help CLASS"
    )
    add_options(made)
    return made


def add_options(made: argparse.ArgumentParser) -> None:
    """The options other than the classes."""
    made.add_argument("--out", required=True, metavar="FOLDER", help="where the features go")
    made.add_argument("--weights", metavar="FILE", help="state_dict or checkpoint of the backbone")
    made.add_argument(
        "--prefix", default="", help="prefix of the backbone's entries in that checkpoint, such as 'backbone.'"
    )
    made.add_argument(
        "--seed", type=int, default=42, help="seed of weights that are not read from a file (default: 42)"
    )
    made.add_argument(
        "--shifts", type=str, nargs="*", metavar="SHIFT", help="also cache the test rows under these shifts"
    )
    made.add_argument(
        "--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="S", help="of the shifts (default: all)"
    )
    made.add_argument("--device", default="cpu", help="where the backbone runs (default: cpu)")
    made.add_argument("--overwrite", action="store_true", help="replace a cache of other data or another network")
