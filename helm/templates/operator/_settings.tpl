{{/* The operator's settings, `calotype.operator.settings.OperatorSettings`. */}}
{{- define "calotype.operatorSettings" -}}
release: {{ .Release.Name }}
namespaces: {{ include "calotype.namespaces" . }}
serveImage: {{ include "calotype.image" (dict "root" $ "image" .Values.image.serve) }}
serveImagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
gatewayConfigMap: {{ .Release.Name }}-gateway-config
internalTokenSecretRef: {name: {{ include "calotype.internalSecret" . }}, key: token}
{{- if include "calotype.embedded" . }}
dataClaim: {{ include "calotype.claim" . }}
{{- end }}
{{- with .Values.audit.existingClaim }}
auditClaim: {{ . }}
{{- end }}
{{- with .Values.models.tls.existingSecret }}
modelsTls: {secret: {{ . }}}
{{- end }}
{{- if .Values.redis.address }}
redis:
  address: {{ .Values.redis.address }}
  {{- with .Values.redis.existingSecret }}
  {{- if .name }}
  passwordSecretRef: {name: {{ .name }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
{{- end }}
rayVersion: {{ .Values.ray.version | quote }}
maxOutageSeconds: {{ .Values.jobs.maxOutageSeconds }}
{{- with .Values.operator.settings }}
{{ toYaml . }}
{{- end }}
podSecurityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
containerSecurityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
healthPort: 8080
metricsPort: 9090
resourceProfiles:
  {{- toYaml .Values.resourceProfiles | nindent 2 }}
{{- end }}
