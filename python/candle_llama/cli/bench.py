"""`candle-llama bench MODEL`; the package `candle_llama.bench` defines its flags."""

import argparse

from candle_llama import bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    bench.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    return bench.main(args)
