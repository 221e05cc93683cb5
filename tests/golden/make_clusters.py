"""What public tools accept, as the small clusters.json that the templates of launch/clusters are held against.

    python -m tests.golden.make_clusters JOBSET_CLONE      (with skypilot installed)

JobSet: github.com/kubernetes-sigs/jobset at 08dfbdfd, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml: names, types and
limits, without descriptions and without parts of a pod that no template has.  SkyPilot: `sky.utils.schemas` of skypilot 0.14.1.
gcloud: the synopses of https://cloud.google.com/sdk/gcloud/reference/..., and SLURM: the pages of sbatch and srun on
https://slurm.schedmd.com, both read on 2026-11-21; those are typed in below.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CRD = "08dfbdfd682714a9ab929633eca8dc95315187e7:config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"
KEEP = {"type", "required", "enum", "minimum", "maximum", "minItems", "maxItems", "pattern", "anyOf", "oneOf", "x-kubernetes-int-or-string"}
DROP = {"affinity", "ephemeralContainers", "initContainers", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "status",
        "volumeClaimPolicies", "topologySpreadConstraints", "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "downwardAPI",
        "ephemeral", "fc", "flexVolume", "flocker", "glusterfs", "iscsi", "photonPersistentDisk", "portworxVolume", "projected", "quobyte",
        "rbd", "scaleIO", "storageos", "vsphereVolume", "windowsOptions", "resourceClaims"}

EVERYWHERE = ["project", "quiet", "format", "filter", "verbosity"]
GCLOUD = {
    "compute tpus queued-resources create": [
        "zone", "runtime-version", "accelerator-type", "topology", "type", "node-id", "node-count", "node-prefix", "async", "boot-disk",
        "data-disk", "description", "guaranteed", "internal-ips", "labels", "metadata", "metadata-from-file", "network", "range", "reserved",
        "scopes", "service-account", "shielded-secure-boot", "spot", "subnetwork", "tags", "valid-after-duration", "valid-after-time",
        "valid-until-duration", "valid-until-time", "reservation-host-folder", "reservation-host-organization", "reservation-host-project"],
    "compute tpus queued-resources describe": ["zone"],
    "compute tpus queued-resources delete": ["zone", "async", "force"],
    "compute tpus queued-resources ssh": [
        "batch-size", "dry-run", "force-key-file-overwrite", "node", "plain", "ssh-flag", "ssh-key-file", "strict-host-key-checking", "worker",
        "zone", "command", "output-directory", "internal-ip", "tunnel-through-iap", "ssh-key-expiration", "ssh-key-expire-after"],
    "compute tpus queued-resources list": ["zone"],
    "container clusters create": ["location", "workload-pool", "addons", "machine-type", "cluster-version", "num-nodes", "release-channel"],
    "container clusters delete": ["location"],
    "container node-pools create": ["cluster", "location", "node-locations", "machine-type", "tpu-topology", "num-nodes", "spot", "reservation"],
    "container node-pools delete": ["cluster", "location"],
    "services enable": ["async"],
    "artifacts repositories create": ["repository-format", "location", "description"],
    "storage buckets create": ["location", "uniform-bucket-level-access", "enable-hierarchical-namespace", "default-storage-class"],
    "storage buckets add-iam-policy-binding": ["role", "member", "condition"],
    "storage cp": ["recursive", "no-clobber"],
    "auth application-default login": ["no-browser", "scopes"],
    "storage cat": ["display-url", "range"],
    "storage rm": ["all-versions", "recursive", "continue-on-error"],
    "auth configure-docker": ["include-artifact-registry"],
}
SBATCH = ["account", "array", "constraint", "cpus-per-task", "dependency", "error", "exclusive", "export", "gpus", "gpus-per-node",
          "gpus-per-task", "gres", "job-name", "mail-type", "mem", "mem-per-cpu", "no-requeue", "nodelist", "nodes", "ntasks", "ntasks-per-node",
          "open-mode", "output", "partition", "qos", "requeue", "reservation", "signal", "time", "time-min", "wait"]
SRUN = ["chdir", "container-image", "cpu-bind", "cpus-per-task", "export", "gpus-per-node", "gpus-per-task", "input", "kill-on-bad-exit", "label",
        "mpi", "nodes", "ntasks", "ntasks-per-node", "output", "unbuffered", "wait"]


def reduced(schema: Any) -> Any:
    """The schema with what decides and without what explains."""
    if not isinstance(schema, dict):
        return schema
    out = {k: [reduced(x) for x in v] if k in ("anyOf", "oneOf") else v for k, v in schema.items() if k in KEEP}
    if "properties" in schema:
        out["properties"] = {k: reduced(v) for k, v in schema["properties"].items() if k not in DROP}
    if "patternProperties" in schema:
        out["patternProperties"] = {k: reduced(v) for k, v in schema["patternProperties"].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            out[key] = reduced(schema[key])
    return out


def main(clone: str) -> None:
    import yaml
    from sky.utils import schemas

    crd = yaml.safe_load(subprocess.check_output(["git", "-C", clone, "show", CRD], text=True))
    jobset = reduced(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    sky = {name: reduced(getattr(schemas, f"get_{name}_schema")()) for name in ("task", "resources", "storage")}
    flags = {command: sorted(own + EVERYWHERE) for command, own in GCLOUD.items()}
    found = {"jobset": jobset, "skypilot": sky, "gcloud": flags, "sbatch": SBATCH, "srun": SRUN}
    (HERE / "clusters.json").write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
