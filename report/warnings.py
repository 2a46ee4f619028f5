"""Warnings."""


def cut_messages():
    return []
