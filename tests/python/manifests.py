"""Reads manifests from stdin, checks each one against the Kubernetes versions that are named, and prints them as JSON.

Unknown fields are errors. Prints {"objects": […], "errors": ["KIND NAME: what is wrong", …]}.
"""

import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

CUSTOM = json.loads((pathlib.Path(__file__).parent.parent / "chart/custom_resources.json").read_text())


class Loader(yaml.CSafeLoader):
    """YAML's, but a key that is given twice is an error, as it is to Kubernetes."""


def mapping(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.YAMLError(f"given twice: {', '.join(map(str, twice))} {node.start_mark}")
    return loader.construct_mapping(node, deep=True)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)


def check(thing, version):
    """The first error, or None."""
    custom = CUSTOM.get(f"{thing['apiVersion']}/{thing['kind']}")
    try:
        if custom is None:
            kubernetes_validate.validate(thing, version, strict=True)
        else:
            unknown = thing.keys() - {"apiVersion", "kind", "metadata", "spec"}
            if unknown:
                return f"unknown: {', '.join(unknown)}"
            jsonschema.validate(thing["spec"], custom)
    except jsonschema.ValidationError as error:
        return f"{error.json_path}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return error.message
    return None


def main():
    objects = [thing for thing in yaml.load_all(sys.stdin, Loader) if thing]
    errors = []
    for thing in objects:
        for version in sys.argv[1:]:
            error = check(thing, version)
            if error:
                errors.append(f"{thing['kind']} {thing['metadata']['name']} in Kubernetes {version}: {error}")
    print(json.dumps({"objects": objects, "errors": errors}))


main()
