"""Packages of others that hand out hidden states while a model decodes."""

from .system import System

SYSTEMS: tuple[System, ...] = ()
