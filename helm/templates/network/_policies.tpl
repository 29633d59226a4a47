{{/* Pods of this release in namespaces by name, for labels alone anybody can give a pod. Without names in
     any one. Arguments: (dict "root" $ "components" (list "model") "namespaces" (list "calotype")). */}}
{{- define "calotype.peer" -}}
{{- if .namespaces }}
namespaceSelector:
  matchExpressions:
    - {key: kubernetes.io/metadata.name, operator: In, values: {{ toJson .namespaces }}}
{{- else }}
namespaceSelector: {}
{{- end }}
podSelector:
  matchLabels: {app.kubernetes.io/part-of: calotype, app.kubernetes.io/instance: {{ .root.Release.Name }}}
  matchExpressions:
    - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .components }}}
{{- end }}

{{/* Pods of this release in the policy's namespace. Same arguments. */}}
{{- define "calotype.pods" -}}
matchLabels: {app.kubernetes.io/part-of: calotype, app.kubernetes.io/instance: {{ .root.Release.Name }}}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .components }}}
{{- end }}

{{/* Egress to the world on some TCP ports, as one rule. Argument: a list of ports. */}}
{{- define "calotype.egressPorts" -}}
- ports:
    {{- range . | uniq }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}

{{/* Ports of what holds state, for one component: a JSON list. Arguments: (dict "root" $ "component" "model"). */}}
{{- define "calotype.statePorts" -}}
{{- $ports := list -}}
{{- with .root.Values -}}
{{- if and .objectStore.url (eq $.component "gateway") }}{{ $ports = append $ports .networkPolicy.objectStorePort }}{{ end -}}
{{- if and .database.existingSecret.name (eq $.component "gateway") }}{{ $ports = append $ports .networkPolicy.databasePort }}{{ end -}}
{{- if and .redis.address (eq $.component "model") }}{{ $ports = append $ports (last (splitList ":" .redis.address) | int) }}{{ end -}}
{{- end -}}
{{ toJson $ports }}
{{- end }}

{{- define "calotype.networkPolicyHead" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ .root.Release.Name }}-{{ .name }}
  namespace: {{ .namespace }}
  labels:
    {{- include "calotype.labels" (dict "root" .root "component" .name) | nindent 4 }}
{{- end }}
