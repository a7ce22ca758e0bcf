{{/* Names and labels. A name leaves room for the suffixes that are put behind it, so that none exceeds 63 characters. */}}

{{- define "ngd.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: "-controller" and the like follow. A Service's name has no dots and begins with a letter;
     a release's may have dots, and may begin with a digit. */}}
{{- define "ngd.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "ngd.name" . -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- if regexMatch "^[0-9]" $release -}}
{{- $release = printf "r%s" $release -}}
{{- end -}}
{{- if contains $name $release -}}
{{- $release | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" ($release | trunc (int (sub 39 (len $name))) | trimSuffix "-") $name -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "ngd.controllerName" -}}{{ include "ngd.fullname" . }}-controller{{- end -}}
{{- define "ngd.dashboardName" -}}{{ include "ngd.fullname" . }}-dashboard{{- end -}}

{{/* KubeRay puts "-head-svc" behind it, and cuts names at 50 characters from the left. */}}
{{- define "ngd.rayClusterName" -}}
{{- printf "%s-ray" (include "ngd.fullname" . | trunc 36 | trimSuffix "-") -}}
{{- end -}}

{{- define "ngd.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ngd.controllerName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Labels of every object; a component is added by the caller: (dict "root" . "component" "controller"). */}}
{{- define "ngd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "ngd.podLabels" . }}
{{- end -}}

{{/* Labels of a pod: without the chart's version, which would restart it although nothing of it has changed. */}}
{{- define "ngd.podLabels" -}}
{{- $root := .root -}}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: ngd
{{ include "ngd.selectorLabels" . }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What a selector may use: it can never change, so it is these three and no more. */}}
{{- define "ngd.selectorLabels" -}}
app.kubernetes.io/name: {{ include "ngd.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "ngd.metadata" -}}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "ngd.labels" . | nindent 2 }}
{{- $annotations := merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* registry/repository@digest or :tag. (dict "root" . "image" .Values.image "tag" "0.1.0") */}}
{{- define "ngd.image" -}}
{{- $registry := .image.registry | default .root.Values.global.imageRegistry -}}
{{- with $registry -}}{{ trimSuffix "/" . }}/{{- end -}}
{{- .image.repository -}}
{{- if .image.digest -}}@{{ .image.digest }}{{- else -}}:{{ .image.tag | default .tag }}{{- end -}}
{{- end -}}

{{- define "ngd.serviceImage" -}}
{{- include "ngd.image" (dict "root" . "image" .Values.image "tag" .Chart.AppVersion) -}}
{{- end -}}

{{- define "ngd.workerImage" -}}
{{- include "ngd.image" (dict "root" . "image" .Values.workerImage "tag" (printf "%s-%s" .Chart.AppVersion .Values.workerImage.variant)) -}}
{{- end -}}

{{/* The controller's: with the local dispatcher it trains by itself. */}}
{{- define "ngd.controllerImage" -}}
{{- if eq .Values.dispatcher.mode "local" -}}{{ include "ngd.workerImage" . }}{{- else -}}{{ include "ngd.serviceImage" . }}{{- end -}}
{{- end -}}

{{- define "ngd.controllerPullPolicy" -}}
{{- if eq .Values.dispatcher.mode "local" -}}{{ .Values.workerImage.pullPolicy }}{{- else -}}{{ .Values.image.pullPolicy }}{{- end -}}
{{- end -}}

{{/* Whether the installation runs Ray's pods itself: one cluster, or one an attempt. */}}
{{- define "ngd.ownsRay" -}}
{{- if or .Values.rayCluster.enabled (eq .Values.dispatcher.mode "kuberay") -}}true{{- end -}}
{{- end -}}

{{/* Whether more than one controller answers, whose pages need a sticky route. */}}
{{- define "ngd.severalControllers" -}}
{{- if or (gt (int .Values.controller.replicas) 1) .Values.controller.autoscaling.enabled -}}true{{- end -}}
{{- end -}}

{{- define "ngd.publicUrl" -}}
{{- if .Values.controller.publicUrl -}}
{{- .Values.controller.publicUrl -}}
{{- else if .Values.ingress.enabled -}}
{{- printf "%s://%s" (ternary "https" "http" .Values.ingress.tls.enabled) .Values.ingress.host -}}
{{- else if and .Values.httpRoute.enabled .Values.httpRoute.hostnames -}}
{{- printf "%s://%s" (ternary "https" "http" .Values.httpRoute.https) (first .Values.httpRoute.hostnames) -}}
{{- end -}}
{{- end -}}

{{- define "ngd.workerUrl" -}}
{{- if .Values.controller.workerUrl -}}
{{- .Values.controller.workerUrl -}}
{{- else if eq .Values.dispatcher.mode "local" -}}
{{- /* A socket on :: takes no IPv4. */}}
{{- ternary "http://[::1]:8000" "http://127.0.0.1:8000" (contains ":" .Values.controller.host) -}}
{{- else -}}
http://{{ include "ngd.controllerName" . }}.{{ .Release.Namespace }}.svc:8000
{{- end -}}
{{- end -}}
