{{/* Labels of an object. Arguments: (dict "root" $ "component" "gateway"). */}}
{{- define "calotype.labels" -}}
{{ include "calotype.selector" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: calotype
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The labels that select a component's pods; they never change. */}}
{{- define "calotype.selector" -}}
app.kubernetes.io/name: calotype
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* An image. Arguments: (dict "root" $ "image" .Values.image.gateway). */}}
{{- define "calotype.image" -}}
{{- $values := .root.Values.image -}}
{{- with $values.registry }}{{ . }}/{{ end -}}
{{- .image.repository -}}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $values.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "calotype.internalSecret" -}}
{{ .Values.secrets.internal.existingSecret | default (printf "%s-internal" .Release.Name) }}
{{- end }}

{{- define "calotype.auditSecret" -}}
{{ .Values.audit.existingSecret | default (printf "%s-audit" .Release.Name) }}
{{- end }}

{{- define "calotype.apiKeySecret" -}}
{{ .Values.secrets.apiKey.existingSecret | default (printf "%s-api-key" .Release.Name) }}
{{- end }}

{{/* "true" where SQLite or the folder of pictures needs the volume. */}}
{{- define "calotype.embedded" -}}
{{- if or (not .Values.database.existingSecret.name) (not .Values.objectStore.url) -}}true{{- end -}}
{{- end }}

{{- define "calotype.claim" -}}
{{ .Values.persistence.existingClaim | default (printf "%s-data" .Release.Name) }}
{{- end }}

{{- define "calotype.blobUrl" -}}
{{ .Values.objectStore.url | default "file:///var/lib/calotype/assets" }}
{{- end }}

{{- define "calotype.sqliteUrl" -}}
sqlite:////var/lib/calotype/calotype.db
{{- end }}

{{/* The watched namespaces as a JSON list; ["*"] = all. */}}
{{- define "calotype.namespaces" -}}
{{- if eq .Values.rbac.scope "cluster" -}}
["*"]
{{- else -}}
{{ prepend .Values.rbac.namespaces .Release.Namespace | uniq | toJson }}
{{- end -}}
{{- end }}
