{{/* What is scaled by another hand than Helm's: an upgrade keeps the number that runs. docs/decisions/0017 says how. */}}

{{/* The number of controllers; nothing if it is the HorizontalPodAutoscaler's alone. */}}
{{- define "ngd.controllerReplicas" -}}
{{- if not .Values.controller.autoscaling.enabled -}}
{{- int .Values.controller.replicas -}}
{{- else -}}
{{- with lookup "apps/v1" "Deployment" .Release.Namespace (include "ngd.controllerName" .) -}}
{{- /* A field that Helm has given before and leaves out now would become 1, unless another hand holds it by then. */}}
{{- $isGivenUp := false -}}
{{- range .metadata.managedFields -}}
{{- $fields := dig "f:spec" dict .fieldsV1 -}}
{{- if and (eq .operation "Apply") (hasKey $fields "f:template") (not (hasKey $fields "f:replicas")) -}}
{{- $isGivenUp = true -}}
{{- end -}}
{{- end -}}
{{- if not $isGivenUp -}}{{- int .spec.replicas -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Of each live worker group what the chart does not give, the number of pods among it; a map by name. Ray's autoscaler
     becomes the owner of the whole list of groups, so that Helm 4 takes only a list that is the same. */}}
{{- define "ngd.liveWorkerGroups" -}}
{{- $groups := dict -}}
{{- if and .Values.rayCluster.enabled .Values.rayCluster.autoscaling.enabled -}}
{{- $live := lookup "ray.io/v1" "RayCluster" .Release.Namespace (include "ngd.rayClusterName" .) -}}
{{- range dig "spec" "workerGroupSpecs" list $live -}}
{{- $groups = set $groups .groupName (omit . "groupName" "minReplicas" "maxReplicas" "rayStartParams" "template") -}}
{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}
