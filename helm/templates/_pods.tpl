{{/* What every pod of the release has. Arguments: (dict "root" $ "values" .Values.gateway). */}}
{{- define "calotype.placement" -}}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* A short-lived pod that runs one Python script of the chart.
     Arguments: (dict "root" $ "name" .. "image" .. "command" (list SCRIPT ..) "configMap" .. "env" list). */}}
{{- define "calotype.script" -}}
restartPolicy: Never
enableServiceLinks: false
{{- include "calotype.placement" (dict "root" .root "values" dict) }}
containers:
  - name: {{ .name }}
    image: {{ include "calotype.image" (dict "root" .root "image" .image) }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    command: {{ concat (list "python") (list (printf "/etc/calotype/%s/%s" .name (first .command))) (rest .command) | toJson }}
    {{- with .env }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    resources:
      requests: {cpu: 50m, memory: 64Mi}
      limits: {memory: 128Mi}
    securityContext:
      {{- toYaml .root.Values.containerSecurityContext | nindent 6 }}
    volumeMounts:
      - {name: script, mountPath: /etc/calotype/{{ .name }}, readOnly: true}
volumes:
  - name: script
    configMap: {name: {{ .configMap }}}
{{- end }}

{{/* Environment that gateway, and no other pod of the chart, needs: where state is and the secrets. */}}
{{- define "calotype.stateEnv" -}}
- {name: CALOTYPE_DATA_DIR, value: /var/lib/calotype}
- name: CALOTYPE_DATABASE_URL
  {{- with .Values.database.existingSecret }}
  {{- if .name }}
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
  {{- else }}
  value: {{ include "calotype.sqliteUrl" $ }}
  {{- end }}
  {{- end }}
- name: CALOTYPE_BLOB_URL
  value: {{ include "calotype.blobUrl" . }}
- name: CALOTYPE_INTERNAL_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "calotype.internalSecret" . }}, key: token}
- name: CALOTYPE_SIGNING_SECRET
  valueFrom:
    secretKeyRef: {name: {{ include "calotype.internalSecret" . }}, key: signing-secret}
- name: CALOTYPE_AUDIT_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "calotype.auditSecret" . }}, key: audit-key}
- name: CALOTYPE_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ include "calotype.apiKeySecret" . }}, key: api-key}
{{- end }}

{{/* Annotations of what a hook's pod needs: made before it, gone with it. */}}
{{- define "calotype.hook" -}}
helm.sh/hook: {{ . }}
helm.sh/hook-weight: "-5"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* The container of the uninstallation hook, without name and command. */}}
{{- define "calotype.releaseContainer" -}}
image: {{ include "calotype.image" (dict "root" $ "image" .Values.image.operator) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
resources:
  requests: {cpu: 50m, memory: 128Mi}
  limits: {memory: 256Mi}
securityContext:
  {{- toYaml .Values.containerSecurityContext | nindent 2 }}
{{- end }}
