{{/* What the operator does in a watched namespace, one line per use. */}}
{{- define "calotype.operatorRules" -}}
# Our kinds: read; finalizers, also those of an older version; the adapter of a LoRATraining; status.
- {apiGroups: [calotype.dev], resources: [imagemodels], verbs: [get, list, watch, patch]}
- {apiGroups: [calotype.dev], resources: [loraadapters], verbs: [get, list, watch, create, patch]}
- {apiGroups: [calotype.dev], resources: [moderationpolicies, teams, loratrainings], verbs: [get, list, watch, patch]}
- apiGroups: [calotype.dev]
  resources: [imagemodels/status, loraadapters/status, moderationpolicies/status, teams/status, loratrainings/status]
  verbs: [patch]
# Models in one pod, and the Jobs that fetch and check files; the pods of these Jobs say what was found. What an earlier
# release called otherwise (Deployments, Services, PodMonitors, RayServices) is deleted when its successor is ready.
- {apiGroups: [apps], resources: [deployments], verbs: [get, list, watch, create, patch, delete]}
- {apiGroups: [batch], resources: [jobs], verbs: [list, watch, create, delete]}
- {apiGroups: [""], resources: [pods], verbs: [list]}
# What belongs to them, and the gateway's configuration; owner references delete it.
- {apiGroups: [""], resources: [configmaps], verbs: [get, create, patch]}
- {apiGroups: [""], resources: [services], verbs: [get, create, patch, delete]}
- {apiGroups: [""], resources: [persistentvolumeclaims], verbs: [get, list, watch, create, patch]}
# Only Secrets that an object or the settings name: never list, never watch. Keys of teams.
- {apiGroups: [""], resources: [secrets], verbs: [get, create, patch]}
# Which adapters a model takes by the labels of their namespace.
- {apiGroups: [""], resources: [namespaces], verbs: [get]}
- {apiGroups: [""], resources: [events], verbs: [create]}
# Models and trainings on Ray clusters.
- {apiGroups: [ray.io], resources: [rayservices], verbs: [get, list, watch, create, patch, delete]}
- {apiGroups: [ray.io], resources: [rayjobs], verbs: [get, list, watch, create, patch]}
- {apiGroups: [ray.io], resources: [rayclusters], verbs: [list, watch, patch]}
- {apiGroups: [monitoring.coreos.com], resources: [podmonitors], verbs: [get, create, patch, delete]}
{{- end }}
