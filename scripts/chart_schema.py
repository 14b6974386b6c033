#!/usr/bin/env python3
"""Writes helm/perigee/values.schema.json: the chart's values, with every setting of the binary by its section.

    .venv/bin/python scripts/chart_schema.py --perigee target/release/perigee [--check]

Settings, their defaults and what they do come from `perigee config`; what a string may be is learnt by giving the binary one that it
cannot take. What Kubernetes itself defines (tolerations, volumes, …) comes from the schemas of kubernetes-validate. With --check nothing
is written, and the exit code is 1 if the file is not what would be.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "helm/perigee/values.schema.json"
# The newest fields that the oldest supported Kubernetes may lack are refused by it, not by us.
KUBERNETES = "v1.33.0"

# What the chart sets by itself, with the value that decides it.
MANAGED = {
    "node.id",
    "node.listen",  # ipFamily
    "node.advertise",
    "node.grpc_port",  # ports.grpc
    "node.http_port",  # ports.http
    "node.transfer_port",  # ports.transfer
    "registry.url",  # etcd
    "model.path",  # model.path, model.pull
    "model.name",  # model.name
    "kv.disk_path",  # nodes.disk
    "kv.disk_capacity",  # nodes.disk.capacity
    "tls.certificate",  # tls
    "tls.key",
    "tls.authority",
    "tls.name",  # tls.name
    "registry.etcd_authority",  # etcd.tls
    "registry.etcd_certificate",
    "registry.etcd_key",
    "router.api_keys_file",  # apiKeys
}
AMOUNT = {"type": "string", "pattern": "^[0-9]"}


def thing(**properties):
    return {"type": "object", "additionalProperties": False, "properties": properties}


def named(value, pattern="^"):
    """Any names, each with such a value."""
    return {"type": "object", "additionalProperties": False, "patternProperties": {pattern: value}}


def a_list(items):
    return {"type": "array", "items": items}


def one_of(*values):
    return {"enum": list(values)}


TEXT = {"type": "string"}
FILLED = {"type": "string", "minLength": 1}
FLAG = {"type": "boolean"}
TEXTS = named(TEXT)
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def count(least=0, most=None):
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


# What cannot be learnt: text of a form of its own, and sections within a section, whose names are free.
KNOWN = {
    "kv.object_url": {"type": "string", "pattern": "^((file|s3)://.*)?$"},
    "transfer.ucx": named(TEXT, "^[A-Za-z0-9_]+$"),
    "store.tenants": named(thing(bytes_max=AMOUNT, weight=count(1))),
    "router.tenants": named(
        thing(weight=count(1), priority_max=one_of("low", "normal", "high"), ttft_slo=AMOUNT, tbt_slo=AMOUNT)
    ),
}


def run(perigee, *arguments):
    environment = {"PATH": "/usr/bin:/bin"}
    # Away from a configuration that may lie around.
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [perigee, *arguments], capture_output=True, text=True, cwd=folder, env=environment, timeout=60, check=False
        )


def string_setting(perigee, key):
    """What a string may be, by what the binary says to one that it is not."""
    answer = run(perigee, "config", "--set", f"{key}=no-such-value").stderr
    if "unknown variant" in answer:
        expected = answer.split("expected", 1)[1]
        return one_of(*sorted(re.findall(r"`([^`]+)`", expected)))
    if "is no duration" in answer or "is no size" in answer:
        return dict(AMOUNT)
    if answer:
        raise SystemExit(f"chart_schema: {key} takes neither any text, nor a name, a duration or a size: {answer}")
    return dict(TEXT)


def setting(perigee, key, default):
    if key in KNOWN:
        return dict(KNOWN[key])
    if isinstance(default, bool):
        return dict(FLAG)
    if isinstance(default, int):
        return count()
    if isinstance(default, float):
        return {"type": "number", "minimum": 0}
    if isinstance(default, str):
        return string_setting(perigee, key)
    raise SystemExit(f"chart_schema: {key} is of a kind that is not known here: {default!r}")


def settings(perigee):
    """`config`: every section with every setting but those that the chart sets."""
    defaults = json.loads(run(perigee, "config", "-o", "json").stdout)
    descriptions, section = {}, ""
    for line in run(perigee, "config", "--markdown").stdout.splitlines():
        if heading := re.fullmatch(r"## `\[(\w+)\]`", line):
            section = heading[1]
        elif row := re.fullmatch(r"\| `(\w+)` \| `.*?` \| (.*) \|", line):
            descriptions[f"{section}.{row[1]}"] = row[2]
    unknown = MANAGED - {f"{section}.{key}" for section, keys in defaults.items() for key in keys}
    if unknown:
        raise SystemExit(f"chart_schema: the binary has no setting {', '.join(sorted(unknown))}")
    sections = {}
    for section, keys in defaults.items():
        free = {key: default for key, default in keys.items() if f"{section}.{key}" not in MANAGED}
        properties = {
            key: setting(perigee, f"{section}.{key}", default)
            | {"default": default, "description": descriptions[f"{section}.{key}"]}
            for key, default in free.items()
        }
        sections[section] = thing(**properties)
    return thing(**{section: keys for section, keys in sections.items() if keys["properties"]})


def buckets(name):
    """The upper bounds of a kind of histogram, from the code."""
    text = (ROOT / "libs/node/src/metrics.rs").read_text()
    bounds = re.search(rf"pub const {name}: &\[f64\] = &\[(.*?)\];", text, re.S)[1]
    return one_of(*(int(bound) if bound.is_integer() else bound for bound in map(float, bounds.replace(",", " ").split())))


class Kubernetes:
    """Definitions of Kubernetes' own, as far as they are used, without their descriptions."""

    def __init__(self):
        import kubernetes_validate

        folder = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
        self.all = json.loads((folder / f"{KUBERNETES}-local-strict/_definitions.json").read_text())["$defs"]
        self.used = {}

    def ref(self, name):
        full = next(full for full in self.all if full.startswith("io.k8s.") and full.endswith(f".{name}"))
        self.take(full)
        return {"$ref": f"#/definitions/{self.short(full)}"}

    def short(self, full):
        return "k8s." + full.rsplit(".", 1)[-1]

    def take(self, full):
        if self.short(full) not in self.used:
            self.used[self.short(full)] = {}
            self.used[self.short(full)] = self.strip(self.all[full])

    def strip(self, node, properties=False):
        if isinstance(node, list):
            return [self.strip(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node and not properties:
            full = node["$ref"].rsplit("/", 1)[-1]
            self.take(full)
            return {"$ref": f"#/definitions/{self.short(full)}"}
        kept = node if properties else {k: v for k, v in node.items() if k != "description" and not k.startswith("x-")}
        return {key: self.strip(value, key == "properties" and not properties) for key, value in kept.items()}


def image(k8s):
    return thing(
        registry=TEXT,
        repository=FILLED,
        tag=TEXT,
        digest={"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
        pullPolicy=one_of("Always", "IfNotPresent", "Never"),
    )


def scheduling(k8s):
    return dict(
        resources=k8s.ref("v1.ResourceRequirements"),
        nodeSelector=TEXTS,
        tolerations=a_list(k8s.ref("v1.Toleration")),
        affinity=k8s.ref("v1.Affinity"),
        topologySpreadConstraints=a_list(k8s.ref("v1.TopologySpreadConstraint")),
        priorityClassName=TEXT,
        podLabels=TEXTS,
        podAnnotations=TEXTS,
    )


def pods(k8s):
    """`defaults`: what the pods of all roles have."""
    probe = thing(periodSeconds=count(1), timeoutSeconds=count(1), failureThreshold=count(1))
    return dict(
        **scheduling(k8s),
        runtimeClassName=TEXT,
        extraEnv=a_list(k8s.ref("v1.EnvVar")),
        extraEnvFrom=a_list(k8s.ref("v1.EnvFromSource")),
        extraArgs=a_list(TEXT),
        extraVolumes=a_list(k8s.ref("v1.Volume")),
        extraVolumeMounts=a_list(k8s.ref("v1.VolumeMount")),
        podSecurityContext=k8s.ref("v1.PodSecurityContext"),
        probes=thing(startup=probe, liveness=probe, readiness=probe),
        drain=thing(enabled=FLAG),
        terminationGracePeriodSeconds=count(1),
        pdb=thing(enabled=FLAG, maxUnavailable={"type": ["integer", "string"], "pattern": "^[0-9]+%$", "minimum": 0}),
    )


def nodes(k8s):
    """`nodes`: what prefill, decode and store have."""
    return dict(
        replicas=count(),
        kind=one_of("StatefulSet", "Deployment"),
        disk=thing(enabled=FLAG, size=AMOUNT, capacity=AMOUNT, storageClassName=TEXT),
        rdma=thing(
            enabled=FLAG,
            resourceName=FILLED,
            count=count(1),
            hugepages=thing(size=one_of("2Mi", "1Gi"), amount=TEXT),
            runAsRoot=FLAG,
            hostNetwork=FLAG,
        ),
    )


def autoscaling(**own):
    return thing(
        kind=one_of("none", "keda", "hpa"),
        minReplicas=count(1),
        maxReplicas=count(1),
        scaleDownStabilizationSeconds=count(0, 3600),
        **own,
    )


def role(own):
    """A role, and pools that may say the same again."""
    return thing(**own, pools=named(thing(**own), "^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$"))


def model(k8s):
    return thing(
        name=TEXT,
        path={"type": "string", "pattern": "^([^/].*)?$"},
        pull=thing(
            enabled=FLAG,
            reference={"type": "string", "pattern": "^(hf:[^/]+/.+|https?://.+)$"},
            sha256={"type": "string", "pattern": "^([0-9a-f]{64})?$"},
            hfToken=thing(existingSecret=TEXT, key=FILLED),
            extraEnv=a_list(k8s.ref("v1.EnvVar")),
            resources=k8s.ref("v1.ResourceRequirements"),
        ),
        volume=thing(
            type=one_of("emptyDir", "claim", "existingClaim", "hostPath", "image"),
            emptyDir=thing(sizeLimit=TEXT),
            claim=thing(size=AMOUNT, storageClassName=TEXT, accessModes=a_list(TEXT)),
            existingClaim=TEXT,
            hostPath={"type": "string", "pattern": "^(/.*)?$"},
            image=thing(reference=TEXT, pullPolicy=one_of("Always", "IfNotPresent", "Never")),
        ),
    )


def etcd(k8s):
    return thing(
        enabled=FLAG,
        endpoints=a_list({"type": "string", "pattern": "^[^/,]+:[0-9]+$"}),
        tls=thing(existingSecret=TEXT, clientCertificate=FLAG),
        image=image(k8s),
        replicas=one_of(1, 3, 5),
        persistence=thing(enabled=FLAG, size=AMOUNT, storageClassName=TEXT),
        **scheduling(k8s),
    )


def tls():
    duration = {"type": "string", "pattern": "^([0-9]+(h|m|s))+$"}
    manager = thing(
        enabled=FLAG,
        issuerRef=thing(name=TEXT, kind=FILLED, group=FILLED),
        duration=duration,
        renewBefore=duration,
        extraDnsNames=a_list(FILLED),
    )
    return thing(enabled=FLAG, existingSecret=TEXT, name=TEXT, certManager=manager)


def metrics():
    return thing(
        podMonitor=thing(enabled=FLAG, interval=AMOUNT, labels=TEXTS),
        rules=thing(enabled=FLAG, labels=TEXTS),
        dashboards=thing(enabled=FLAG, labels=TEXTS, annotations=TEXTS),
        prometheusUrl={"type": "string", "pattern": "^https?://"},
    )


def schema(perigee):
    k8s = Kubernetes()
    peers = a_list(k8s.ref("v1.NetworkPolicyPeer"))
    secrets = a_list(k8s.ref("v1.LocalObjectReference"))
    config = {"$ref": "#/definitions/config"}
    node = dict(**pods(k8s), **nodes(k8s), config=config)
    prefill = dict(node, autoscaling=autoscaling(queuedTokens=count(1)))
    decode = dict(node, autoscaling=autoscaling(kvUsedPercent=count(1, 100), sloAttainment=FLAG))
    service = thing(
        type=one_of("ClusterIP", "NodePort", "LoadBalancer"), annotations=TEXTS, httpPort=PORT, grpcPort=PORT
    )
    # Gateways are named in many ways; the route is checked by its own definition.
    gateway = thing(
        group=TEXT, kind=TEXT, namespace=TEXT, name=FILLED, sectionName=TEXT, port=PORT
    ) | {"required": ["name"]}
    route = thing(enabled=FLAG, parentRefs=a_list(gateway), hostnames=a_list(TEXT), annotations=TEXTS)
    image_with_secrets = image(k8s)
    image_with_secrets["properties"]["pullSecrets"] = secrets
    values = thing(
        # Helm's own, where this chart is a part of another.
        **{"global": {"type": "object"}},
        nameOverride=TEXT,
        fullnameOverride=TEXT,
        image=image_with_secrets,
        model=model(k8s),
        tls=tls(),
        apiKeys=thing(existingSecret=TEXT, key=FILLED),
        config=config,
        defaults=thing(**pods(k8s)),
        nodes=thing(**nodes(k8s)),
        router=thing(**pods(k8s), replicas=count(), config=config, service=service, httpRoute=route),
        prefill=role(prefill),
        decode=role(decode),
        store=role(node),
        ports=thing(http=PORT, grpc=PORT, transfer=PORT),
        ipFamily=one_of("IPv4", "IPv6"),
        etcd=etcd(k8s),
        serviceAccount=thing(create=FLAG, name=TEXT, annotations=TEXTS),
        networkPolicy=thing(
            enabled=FLAG, clients=peers, monitoring=peers, extraEgress=a_list(k8s.ref("v1.NetworkPolicyEgressRule"))
        ),
        slo=thing(
            timeToFirstTokenSeconds=buckets("LATENCY_SECONDS"),
            interTokenLatencySeconds=buckets("STEP_SECONDS"),
            attainmentPercent={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
        ),
        metrics=metrics(),
        tests=thing(enabled=FLAG, apiKey=thing(existingSecret=TEXT, key=FILLED)),
        extraObjects=a_list({"type": ["object", "string"]}),
    )
    definitions = {"config": settings(perigee)} | dict(sorted(k8s.used.items()))
    return {"$schema": "http://json-schema.org/draft-07/schema#", **values, "definitions": definitions}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--perigee", required=True, type=pathlib.Path, help="the binary whose settings are meant")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the file is out of date")
    arguments = parser.parse_args()
    text = json.dumps(schema(arguments.perigee.resolve()), indent=1, ensure_ascii=False) + "\n"
    if not arguments.check:
        SCHEMA.write_text(text)
    elif SCHEMA.read_text() != text:
        print(f"{SCHEMA.relative_to(ROOT)} is out of date: run scripts/chart_schema.py without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
