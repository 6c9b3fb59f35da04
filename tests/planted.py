"""Plantings of untrained networks that tests share."""

import copy
from types import SimpleNamespace

import torch

import kdx
from kdx.data.cues import Scene
from kdx.explain.explainers import Maps
from kdx.planted.plantings import PLANTINGS, Grown, images_of

SCENE = Scene(size=24, cue_size=8)


def make_networks():
    roles = ("student", "base", "second base")
    found = {role: kdx.build("resnet10", 27, "small", 0.125, seed=i).eval() for i, role in enumerate(roles)}
    return {role: SimpleNamespace(key=role, model=net) for role, net in found.items()}


def make_plantings(networks):
    test, others = images_of(SCENE, 12, 0), images_of(SCENE, 54, 1)
    students = {name: SimpleNamespace(key=name, model=copy.deepcopy(networks["student"].model)) for name in PLANTINGS}
    return [Grown(name, 0, SCENE, networks | {"student": students[name]}, test, others) for name in PLANTINGS]


def constant(student, base, images, labels):
    names = kdx.stages(student, images[:1])
    return Maps(*(dict.fromkeys(names, torch.ones(len(images), 4, 4)) for _ in range(2)))
