{{/* The controller's own folder: SQLite's file is there, and with the local dispatcher the runs; otherwise it may be lost. */}}
{{- define "ngd.homeClaim" -}}
{{- if .Values.storage.home.existingClaim -}}
{{- .Values.storage.home.existingClaim -}}
{{- else if or (eq .Values.database.type "sqlite") (eq .Values.dispatcher.mode "local") -}}
{{- include "ngd.fullname" . }}-home
{{- end -}}
{{- end -}}

{{- define "ngd.runsClaim" -}}
{{- .Values.storage.runs.existingClaim | default (printf "%s-runs" (include "ngd.fullname" .)) -}}
{{- end -}}

{{/* The names of the claims that the service writes to, with a space between them. */}}
{{- define "ngd.claims" -}}
{{ include "ngd.homeClaim" . }}{{ if ne .Values.dispatcher.mode "local" }} {{ include "ngd.runsClaim" . }}{{ end }}
{{- end -}}

{{/* One claim. (dict "root" . "name" "ngd-home" "component" "controller" "claim" .Values.storage.home) */}}
{{- define "ngd.claim" -}}
{{- $class := .claim.storageClass | default .root.Values.global.storageClass -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  {{- include "ngd.metadata" (dict "root" .root "component" .component "annotations" (ternary (dict "helm.sh/resource-policy" "keep") (dict) .claim.keep)) | nindent 2 }}
spec:
  accessModes:
    {{- toYaml .claim.accessModes | nindent 4 }}
  {{- with $class }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ .claim.size }}
{{- end -}}
