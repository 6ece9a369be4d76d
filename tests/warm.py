"""Imported by the server of the tests' forks, so that they have their imports done."""

from experiments.forks import imports

imports()
