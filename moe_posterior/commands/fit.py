"""``moe-posterior fit``."""

import argparse

HELP = """
Train the arms of an experiment one after the other, all from the same seed.

An experiment file is a LightningCLI configuration (model, data, trainer, seed_everything, competence) with two more keys:
'name', the run's folder, and 'arms', a mapping from names to what each arm sets differently, usually model.gate. Classes are
named by class_path, so your own data module, backbone or gate needs no registration: class Mine in my_data.py of the current folder is
my_data.Mine, unless an installed package is called my_data.

The model is this library's classifier, unless model names a LightningModule of your own by class_path. Then every gate in it that
holds a belief gets clusters and evidence while it trains; 'belief' in place of 'competence' holds the settings of that.

Run the same command again to resume an interrupted run from its last epoch; finished arms are left as they are.
"""
EXAMPLES = """
examples:
  moe-posterior fit --config configs/demo.yaml                                  both gates on scikit-learn's digits, a minute
  moe-posterior fit --config configs/cifar10h.yaml --arms posterior             one arm only
  moe-posterior fit --config configs/demo.yaml --name try --trainer.max_epochs 3 --data.batch_size 32
                                                                 any other option is a setting and applies to every arm
  moe-posterior fit --config configs/demo.yaml --print_config                   the complete configuration with all defaults
  moe-posterior fit --config configs/mine.yaml --model.class_path my_model.Mine --belief.warmup 50
                                                                 a LightningModule of your own
  moe-posterior fit --data.help PACS                                            the settings of a class; likewise --model.method.help
                                                                 Robust, --model.gate.help, --model.backbone.help
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "moe-posterior fit",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", required=True, metavar="FILE", help="experiment file (YAML)")
    made.add_argument("--name", help="folder of the run, instead of the experiment's own name")
    made.add_argument("--run-dir", default="runs", metavar="DIR", help="where runs live (default: %(default)s)")
    made.add_argument("--arms", nargs="+", metavar="ARM", help="train only these arms")
    made.add_argument("--overwrite", action="store_true", help="start over instead of resuming an existing run")
    made.add_argument(
        "--print_config", action="store_true", help="print the complete configuration of an arm, and stop"
    )
    return made
