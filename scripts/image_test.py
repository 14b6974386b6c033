#!/usr/bin/env python3
"""Runs what the chart renders: builds the image, starts routers, nodes and etcd from the rendered pods on a network of their own, and
lets the pod of `helm test` ask them.

    .venv/bin/python scripts/image_test.py --perigee target/release/perigee --model models/….gguf

Needs root, podman with runc, CNI's plugins, etcd, and nothing from a registry: images are made from nothing, as the last stage of the
Containerfile does it. A pod becomes a container with the pod's command, environment, files, user and rights. What only Kubernetes has
(probes, names, volumes) is done here: names by /etc/hosts, claims as folders. Init containers get the model from a web server of this
script. Afterwards a node and a member of etcd are stopped, and the test must pass again.
"""

import argparse
import functools
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE, NAMESPACE = "r", "perigee"
IMAGE, ETCD_IMAGE = "localhost/perigee-test:chart", "localhost/perigee-test:etcd"
NETWORK, SUBNET = "perigee-test", "10.89.77"
READY_SECONDS = 180
SIZES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}

VALUES = {
    "image": {"registry": "localhost", "repository": "perigee-test", "tag": "chart"},
    # Small, since all of them share this machine.
    "config": {"kv": {"memory": "256MiB"}, "model": {"threads": 1}, "log": {"filter": "info"}},
    "router": {"replicas": 1},
    "store": {"pools": {"default": {"replicas": 1, "disk": {"enabled": True, "capacity": "128MiB"}}}},
    "etcd": {"image": {"registry": "localhost", "repository": "perigee-test", "tag": "etcd"}},
}


def say(text):
    print(f"image_test: {text}", file=sys.stderr, flush=True)


class Podman:
    """podman with storage, networks and limits of its own, so that nothing of the user's is touched."""

    def __init__(self, folder):
        self.folder = folder
        conf = folder / "containers.conf"
        # Limits that a process without CAP_SYS_RESOURCE may set, too.
        conf.write_text(
            '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n'
            '[engine]\nruntime = "runc"\nevents_logger = "file"\ncgroup_manager = "cgroupfs"\n'
            f'[network]\nnetwork_backend = "cni"\nnetwork_config_dir = "{folder}/cni"\n'
            'cni_plugin_dirs = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"]\n'
        )
        self.environment = dict(os.environ, CONTAINERS_CONF=str(conf))
        self.base = ["podman", "--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self.names = []

    def __call__(self, *arguments, check=True, timeout=300):
        command = [*self.base, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode != 0:
            raise SystemExit(f"image_test: {' '.join(command)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def close(self):
        if self.names:
            self("rm", "--force", "--time", "0", *self.names, check=False)
        self("network", "rm", "--force", NETWORK, check=False)


def build(podman, folder, perigee):
    """Both images. Perigee's is the last stage of the Containerfile, with the root that its first stage would have made."""
    stage = "FROM scratch" + (ROOT / "Containerfile").read_text().split("\nFROM scratch", 1)[1]
    copy = "COPY --from=build /image /"
    assert copy in stage, f"the Containerfile's last stage has no {copy!r}"
    etcd = 'FROM scratch\nCOPY . /\nENV PATH=/usr/bin\n'
    for tag, text, binary in [(IMAGE, stage.replace(copy, "COPY . /"), perigee), (ETCD_IMAGE, etcd, shutil.which("etcd"))]:
        context = folder / "context"
        shutil.rmtree(context, ignore_errors=True)
        stripped = folder / pathlib.Path(binary).name
        shutil.copy(binary, stripped)
        subprocess.run(["strip", "--strip-debug", stripped], check=True)
        subprocess.run([ROOT / "scripts/image_root.sh", context, stripped], check=True)
        (folder / "Containerfile").write_text(text)
        podman("build", "--quiet", "--isolation", "chroot", "--file", folder / "Containerfile", "--tag", tag, context)


def serve(model):
    """Serves the model's folder to the network of the pods, for their init containers, and says the file's URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(model.parent))
    # Not HTTPServer, which looks for the name of its address.
    server = socketserver.ThreadingTCPServer((f"{SUBNET}.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{SUBNET}.1:{server.server_address[1]}/{model.name}"


def render(folder, reference, sha256):
    """The objects of the chart."""
    values = VALUES | {"model": {"pull": {"reference": reference, "sha256": sha256}}}
    path = folder / "values.json"
    path.write_text(json.dumps(values))
    command = [ROOT / ".venv/tools/helm", "template", RELEASE, ROOT / "helm/perigee", "--namespace", NAMESPACE, "--values", path]
    return [thing for thing in yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout) if thing]


class Pod:
    """A pod of a workload, or the pod of the test, and the container that it becomes."""

    def __init__(self, name, address, spec, service=""):
        self.name, self.address, self.spec, self.service = name, address, spec, service
        (self.container,) = spec["containers"]

    def names(self):
        if self.service:
            return [self.name, f"{self.name}.{self.service}.{NAMESPACE}.svc"]
        return [self.name]

    def environment(self, container):
        facts = {"metadata.name": self.name, "status.podIP": self.address}
        found = {}
        for variable in container.get("env", []):
            source = variable.get("valueFrom")
            value = facts[source["fieldRef"]["fieldPath"]] if source else variable["value"]
            found[variable["name"]] = expand(value, found)
        return found

    def volumes(self, folder, config_maps):
        """What the pod's volumes are here, by their names."""
        found = {}
        for volume in self.spec.get("volumes", []):
            if "configMap" in volume:
                path = folder / "config" / self.name
                path.mkdir(parents=True, exist_ok=True)
                for file, text in config_maps[volume["configMap"]["name"]].items():
                    (path / file).write_text(text)
                found[volume["name"]] = path
            elif "hostPath" in volume:
                found[volume["name"]] = pathlib.Path(volume["hostPath"]["path"])
        containers = [self.container, *self.spec.get("initContainers", [])]
        for mount in (mount for container in containers for mount in container.get("volumeMounts", [])):
            if mount["name"] not in found:
                path = folder / "claims" / self.name / mount["name"]
                path.mkdir(parents=True, exist_ok=True)
                os.chown(path, self.spec["securityContext"]["runAsUser"], self.spec["securityContext"]["fsGroup"])
                found[mount["name"]] = path
        return found

    def arguments(self, container, folder, config_maps, hosts):
        """What podman takes to run one of its containers."""
        pod, rights = self.spec["securityContext"], container["securityContext"]
        arguments = ["--name", self.name, "--hostname", self.name, "--network", NETWORK, "--ip", self.address, "--no-hosts=false"]
        arguments += ["--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--pull", "never"]
        arguments += ["--read-only", "--read-only-tmpfs=false"] if rights["readOnlyRootFilesystem"] else []
        arguments += [f"--cap-drop={name}" for name in rights["capabilities"]["drop"]]
        arguments += [f"--cap-add={name}" for name in rights["capabilities"].get("add", [])]
        arguments += [] if rights["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        arguments += ["--memory", size(container["resources"]["limits"]["memory"])]
        for name, address in hosts.items():
            arguments += ["--add-host", f"{name}:{address}"]
        environment = self.environment(container)
        for name, value in environment.items():
            arguments += ["--env", f"{name}={value}"]
        places = self.volumes(folder, config_maps)
        for mount in container.get("volumeMounts", []):
            options = ":ro" if mount.get("readOnly") else ""
            arguments += ["--volume", f"{places[mount['name']]}:{mount['mountPath']}{options}"]
        command = [expand(part, environment) for part in container.get("command", [])]
        if command:
            arguments += ["--entrypoint", json.dumps(command[:1])]
        return [*arguments, container["image"], *command[1:], *(expand(part, environment) for part in container.get("args", []))]

    def ready(self):
        """What its readiness probe says, asked from outside as a kubelet does."""
        probe = self.container["readinessProbe"]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        try:
            with urllib.request.urlopen(f"http://{self.address}:{ports[probe['port']]}{probe['path']}", timeout=3) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False


def expand(text, environment):
    for name, value in environment.items():
        text = text.replace(f"$({name})", value)
    return text


def size(text):
    return str(int(text[:-2]) * SIZES[text[-2:]])


def pods(objects):
    """The pods of all workloads, and that of the test, each with an address."""
    addresses = (f"{SUBNET}.{number}" for number in range(10, 250))
    found, test = [], None
    for thing in objects:
        name = thing["metadata"]["name"]
        if thing["kind"] in ("StatefulSet", "Deployment"):
            for number in range(int(thing["spec"]["replicas"])):
                service = thing["spec"].get("serviceName", "")
                found.append(Pod(f"{name}-{number}", next(addresses), thing["spec"]["template"]["spec"], service))
        elif thing["kind"] == "Pod":
            test = Pod(name, next(addresses), thing["spec"])
    return found, test


def start(podman, pod, folder, config_maps, hosts):
    podman.names.append(pod.name)
    for container in pod.spec.get("initContainers", []):
        podman("run", "--rm", *pod.arguments(container, folder, config_maps, hosts))
    podman("run", "--detach", "--restart", "on-failure", *pod.arguments(pod.container, folder, config_maps, hosts))


def logs(podman, names):
    for name in names:
        done = podman("logs", "--tail", "40", name, check=False)
        print(f"--- {name}\n{done.stdout}{done.stderr}", file=sys.stderr)


def wait(podman, pods):
    deadline = time.monotonic() + READY_SECONDS
    missing = list(pods)
    while missing:
        missing = [pod for pod in missing if not pod.ready()]
        if time.monotonic() > deadline:
            logs(podman, [pod.name for pod in missing])
            raise SystemExit(f"image_test: not ready after {READY_SECONDS} s: {', '.join(pod.name for pod in missing)}")
        time.sleep(0.2)


def pre_stop(podman, pod):
    """What a kubelet runs before it ends the pod."""
    command = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    if not command:
        return
    if "drain" not in podman("exec", pod.name, "perigee", "node", "--help").stdout:
        say(f"{pod.name}: this binary has no `{' '.join(command)}`, so it is not run")
        return
    podman("exec", pod.name, *command, timeout=60)


def ask(podman, test, folder, config_maps, hosts, everybody):
    """Runs the pod of `helm test`."""
    podman.names.append(test.name)
    done = podman("run", "--rm", *test.arguments(test.container, folder, config_maps, hosts), check=False)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        logs(podman, [pod.name for pod in everybody])
        raise SystemExit(f"image_test: the chart's test ended with {done.returncode}: {done.stderr}")


def run(podman, folder, perigee, model):
    say("building the images")
    build(podman, folder, perigee)
    podman("network", "create", "--disable-dns", "--subnet", f"{SUBNET}.0/24", NETWORK)
    # The bridge, and with it its address on this side, is there once something is on it.
    podman("run", "--rm", "--network", NETWORK, IMAGE, "model", "list")
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    objects = render(folder, serve(model), sha256)
    config_maps = {thing["metadata"]["name"]: thing["data"] for thing in objects if thing["kind"] == "ConfigMap"}
    everybody, test = pods(objects)
    hosts = {name: pod.address for pod in everybody for name in pod.names()}
    router = next(pod for pod in everybody if "-router-" in pod.name)
    hosts[f"{RELEASE}-perigee-router"] = router.address
    say(f"starting {', '.join(pod.name for pod in everybody)}")
    for pod in everybody:
        start(podman, pod, folder, config_maps, hosts)
    wait(podman, everybody)
    say("all are ready; asking")
    ask(podman, test, folder, config_maps, hosts, everybody)

    gone = [f"{RELEASE}-perigee-decode-0", f"{RELEASE}-perigee-etcd-0"]
    say(f"stopping {', '.join(gone)}, and asking again")
    for name in gone:
        pre_stop(podman, next(pod for pod in everybody if pod.name == name))
        podman("stop", "--time", "60", name)
        state = json.loads(podman("inspect", name).stdout)[0]["State"]
        # etcd ends by its signal.
        if state["ExitCode"] != 0 and "etcd" not in name:
            logs(podman, [name])
            raise SystemExit(f"image_test: {name} ended with {state['ExitCode']}")
    rest = [pod for pod in everybody if pod.name not in gone]
    wait(podman, rest)
    ask(podman, test, folder, config_maps, hosts, rest)

    say("starting them again, under their names")
    for name in gone:
        podman("start", name)
    wait(podman, everybody)
    ask(podman, test, folder, config_maps, hosts, everybody)
    say("passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--perigee", required=True, type=pathlib.Path, help="the binary")
    parser.add_argument("--model", required=True, type=pathlib.Path, help="a GGUF file")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("image_test: needs root, for containers with addresses of their own")
    for tool in ("podman", "runc", "etcd", "strip"):
        if not shutil.which(tool):
            raise SystemExit(f"image_test: {tool} is missing: scripts/setup.sh image gets it")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="perigee-image-"))
    # Users of containers must reach their claims.
    folder.chmod(0o755)
    podman = Podman(folder)
    try:
        run(podman, folder, arguments.perigee.resolve(), arguments.model.resolve())
    finally:
        podman.close()
        podman("unmount", "--all", check=False)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
