"""pytest plugin for running timm's own test suite on the zoo: registers the models before the tests are collected.

timm chooses the models for its intermediate-features tests by module name; this adds the zoo's modules to them.
"""

import functools

import timm
import timm.models

import mobilenets_zoo  # noqa: F401 - registers the models

ZOO_MODULES = ["mobilenetv1", "mobilenetv2"]

_list_models = timm.list_models


@functools.wraps(_list_models)
def list_models_with_zoo(filter="", module="", **kwargs):
    if isinstance(module, list):
        module = [*module, *ZOO_MODULES]
    return _list_models(filter, module, **kwargs)


timm.list_models = timm.models.list_models = list_models_with_zoo
