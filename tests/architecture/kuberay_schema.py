"""JSON Schemas of the parts of KubeRay's objects that our manifests use.

Written by hand after ray-operator/config/crd/bases/ray.io_rayclusters.yaml, ray.io_rayjobs.yaml and
ray.io_rayservices.yaml, version v1, of KubeRay v1.5.1 to v1.7.0. They are closed, so that a misspelt key shows:
Kubernetes drops one silently. Two rules are the operator's own (controllers/ray/utils/validation.go): the token mode
needs `rayVersion`, and start parameters are text.
"""

from __future__ import annotations

from typing import Any

RESOURCES = {
    "type": "object",
    "required": ["requests", "limits"],
    "additionalProperties": {
        "type": "object",
        "additionalProperties": {"type": "string", "pattern": r"^\d+(m|Mi|Gi)?$"},
    },
}
CONTAINER = {
    "type": "object",
    "required": ["name", "image", "resources"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "image": {"type": "string"},
        "ports": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["containerPort"],
                "additionalProperties": False,
                "properties": {"name": {"type": "string", "maxLength": 15}, "containerPort": {"type": "integer"}},
            },
        },
        "resources": RESOURCES,
        "envFrom": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["secretRef"],
                "properties": {"secretRef": {"type": "object", "required": ["name"]}},
            },
        },
    },
}
GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
    "template": {
        "type": "object",
        "required": ["spec"],
        "additionalProperties": False,
        "properties": {
            "spec": {
                "type": "object",
                "required": ["containers"],
                "additionalProperties": False,
                "properties": {
                    "containers": {"type": "array", "minItems": 1, "items": CONTAINER},
                    "tolerations": {
                        "type": "array",
                        "items": {"type": "object", "required": ["key", "operator", "effect"]},
                    },
                },
            }
        },
    },
}
CLUSTER = {
    "type": "object",
    "required": ["rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "authOptions": {"const": {"mode": "token"}},
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "version": {"enum": ["v1", "v2"]},
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": {"type": "integer"},
            },
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": {"serviceType": {"const": "ClusterIP"}, **GROUP},
        },
        "workerGroupSpecs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["groupName", "maxReplicas", "minReplicas", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": {"type": "integer", "minimum": 0},
                    "minReplicas": {"type": "integer", "minimum": 0},
                    "maxReplicas": {"type": "integer", "minimum": 1},
                    **GROUP,
                },
            },
        },
    },
}
SPECS: dict[str, dict[str, Any]] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "type": "object",
        "required": ["entrypoint", "rayClusterSpec"],
        "additionalProperties": False,
        "properties": {
            "entrypoint": {"type": "string"},
            "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
            "backoffLimit": {"type": "integer", "minimum": 0},
            "shutdownAfterJobFinishes": {"type": "boolean"},
            "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
            "rayClusterSpec": CLUSTER,
        },
    },
    "RayService": {
        "type": "object",
        "required": ["serveConfigV2", "rayClusterConfig"],
        "additionalProperties": False,
        "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": CLUSTER},
    },
}
