{{/* Secrets: their names, and values that are made once. */}}
{{- define "ngd.apiKeysSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-api-keys" (include "ngd.fullname" .)) -}}
{{- end -}}

{{- define "ngd.signingKeySecret" -}}
{{- .Values.auth.signingKeySecret | default (printf "%s-signing-key" (include "ngd.fullname" .)) -}}
{{- end -}}

{{/* The secret that Ray's pods of this installation take their token from. */}}
{{- define "ngd.rayAuthSecret" -}}
{{- .Values.rayCluster.authSecret | default (printf "%s-ray-auth" (include "ngd.fullname" .)) -}}
{{- end -}}

{{/* The secret whose token the controller shows to Ray: with kuberay it speaks to Kubernetes alone. */}}
{{- define "ngd.rayTokenSecret" -}}
{{- if .Values.rayCluster.enabled -}}
{{- include "ngd.rayAuthSecret" . -}}
{{- else if .Values.ray.address -}}
{{- .Values.ray.existingSecret -}}
{{- end -}}
{{- end -}}

{{/* A secret with one generated value. What the cluster already has wins, so that an upgrade changes nothing.
     (dict "root" . "name" "ngd-api-keys" "key" "first" "new" "..." "annotations" (dict)) */}}
{{- define "ngd.generatedSecret" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .name -}}
apiVersion: v1
kind: Secret
metadata:
  name: {{ .name }}
  {{- include "ngd.metadata" (dict "root" .root "component" "controller" "annotations" .annotations) | nindent 2 }}
type: Opaque
data:
  {{- if and $found $found.data }}
  {{- toYaml $found.data | nindent 2 }}
  {{- else }}
  {{ .key }}: {{ .new | b64enc }}
  {{- end }}
{{- end -}}
