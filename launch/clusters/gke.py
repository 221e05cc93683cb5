"""A JobSet for GKE (https://jobset.sigs.k8s.io, v1alpha2), which XPK's clusters and its `workload list` take as one of theirs.

One child job is one slice, one pod is one machine of it.  Pods find each other by what GKE puts into their environment
(TPU_WORKER_HOSTNAMES, and MEGASCALE_* where there are several slices).  The bucket is mounted by the driver of Cloud Storage FUSE.
What surprises: any pod that fails ends its whole slice, and the set then starts all slices again, up to `maxRestarts` times;
a pod that ends with a final exit code ends the set.
"""

import json

from mllm_jax.chips import CHIPS
from mllm_jax.config import ConfigError
from mllm_jax.launch.clusters.job import FINAL, FUSE, GRACE, MOUNT, Job

TYPES = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}


def write(job: Job) -> str:
    """The manifest, for `kubectl apply -f`.

    Raises:
      ConfigError: the layout is not one of TPUs.
    """
    chip, chips, slices = job.machine
    if chip not in TYPES:
        raise ConfigError(f"launch gke writes files for TPUs ({', '.join(TYPES)}); for {chip} use skypilot or slurm")
    indent = lambda lines, n: "\n".join(" " * n + line for line in lines)
    environment = indent([f'- {{name: {k}, value: {json.dumps(v)}}}' for k, v in job.environment.items()], 16)
    command = indent([f"- {json.dumps(word)}" for word in job.command], 16)
    spot = '\n                cloud.google.com/gke-spot: "true"' if job.spot else ""
    spared = "" if not job.spot else '\n              - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
    # Several slices speak over the network of the machines, without the detour through that of the pods.
    direct = "" if slices == 1 else "\n              hostNetwork: true\n              dnsPolicy: ClusterFirstWithHostNet"
    identity = "" if slices == 1 else '\n                    hostNetworkPodKSA: "true"'
    mount = ",".join(["implicit-dirs", *(f"{group}:{k}:{v}" for group, of in FUSE.items() for k, v in of.items())])
    return f"""\
# {job.name}: {slices} x {chip} {job.shape} ({chips} chips, {job.hosts} machines each).
# kubectl apply -f FILE; docs/pods/gke.md is the whole way there and back.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {job.name}
  labels:
    kueue.x-k8s.io/queue-name: {job.options.get("queue", "multislice-queue")}   # does nothing where Kueue is not installed
    xpk.google.com/workload: {job.name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool    # one slice, one node pool
spec:
  ttlSecondsAfterFinished: 43200
  failurePolicy:
    maxRestarts: {job.restarts}
    rules:
      - name: final
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice-job
      replicas: {slices}
      template:
        spec:
          parallelism: {job.hosts}
          completions: {job.hosts}
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob         # the run cannot succeed, or was written wrongly: do not start it again
                onExitCodes:
                  containerName: jax-tpu
                  operator: In
                  values: {list(FINAL)}
          template:
            metadata:
              labels:
                xpk.google.com/workload: {job.name}
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              serviceAccountName: {job.service_account or "default"}    # may read and write the bucket
              terminationGracePeriodSeconds: {GRACE}{direct}
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: {TYPES[chip]}
                cloud.google.com/gke-tpu-topology: {job.shape}{spot}
              tolerations:
              - {{key: google.com/tpu, operator: Exists}}{spared}
              containers:
              - name: jax-tpu
                image: {json.dumps(job.image)}
                command:
{command}
                env:
{environment}
                securityContext:
                  privileged: true
                resources:
                  limits:
                    google.com/tpu: {min(chips, CHIPS[chip].per_host)}
                volumeMounts:
                - {{name: bucket, mountPath: {MOUNT}}}
                - {{name: shm, mountPath: /dev/shm}}
              volumes:
              - name: bucket
                csi:
                  driver: gcsfuse.csi.storage.gke.io
                  volumeAttributes:
                    bucketName: {json.dumps(job.bucket)}
                    mountOptions: "{mount}"{identity}
              - name: shm               # workers that read data hand their arrays over in it
                emptyDir:
                  medium: Memory
"""
