{{/* Ray's pods: the same for one shared cluster and for the cluster of an attempt. */}}

{{- define "ngd.rayAddress" -}}
{{- if .Values.rayCluster.enabled -}}
http://{{ include "ngd.rayClusterName" . }}-head-svc.{{ .Release.Namespace }}.svc:8265
{{- else -}}
{{- .Values.ray.address -}}
{{- end -}}
{{- end -}}

{{/* KubeRay puts app.kubernetes.io/name: kuberay on its pods and selects by it, so that label is not ours to set. */}}
{{- define "ngd.rayPodLabels" -}}
app.kubernetes.io/part-of: ngd
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "ngd.rayClusterSpec" -}}
{{- $v := .Values -}}
rayVersion: {{ $v.rayCluster.rayVersion | quote }}
authOptions:
  mode: token
  secretName: {{ include "ngd.rayAuthSecret" . }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams:
    {{- /* No training on the head: it runs the drivers, and its loss ends the attempt. */}}
    {{- mergeOverwrite (deepCopy $v.rayCluster.head.rayStartParams) (dict "num-cpus" "0" "dashboard-host" "0.0.0.0") | toYaml | nindent 4 }}
  template:
    {{- include "ngd.rayHeadPod" . | nindent 4 }}
workerGroupSpecs:
  {{- $liveGroups := include "ngd.liveWorkerGroups" . | fromYaml }}
  {{- range $v.rayCluster.workerGroups }}
  {{- $group := mergeOverwrite (deepCopy $v.rayCluster.workerDefaults) . }}
  {{- $live := get $liveGroups $group.name | default dict }}
  {{- $replicas := ternary $live.replicas $group.replicas (hasKey $live "replicas") }}
  - groupName: {{ $group.name }}
    replicas: {{ max (int $group.minReplicas) (min (int $group.maxReplicas) (int $replicas)) }}
    {{- with omit $live "replicas" }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    minReplicas: {{ int $group.minReplicas }}
    maxReplicas: {{ int $group.maxReplicas }}
    rayStartParams: {{ $group.rayStartParams | toJson }}
    template:
      {{- include "ngd.rayWorkerPod" (dict "root" $ "group" $group) | nindent 6 }}
  {{- end }}
{{- end -}}

{{- define "ngd.rayHeadPod" -}}
{{- $head := .Values.rayCluster.head -}}
metadata:
  labels:
    {{- include "ngd.rayPodLabels" (dict "root" . "component" "ray-head") | nindent 4 }}
    {{- with $head.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (dict) (default dict $head.annotations) (include "ngd.doNotDisrupt" $head.doNotDisrupt | fromYaml) }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "ngd.rayPodCommon" (dict "root" . "place" $head) | nindent 2 }}
  {{- /* Ray's autoscaler, which KubeRay puts beside the head, makes and deletes pods. */}}
  automountServiceAccountToken: {{ .Values.rayCluster.autoscaling.enabled }}
  {{- with $head.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "ngd.rayExtras" (dict "root" . "part" $head) | nindent 2 }}
  containers:
    - name: ray-head
      {{- include "ngd.rayContainer" (dict "root" . "part" $head) | nindent 6 }}
      ports:
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: client, containerPort: 10001, protocol: TCP}
        - {name: metrics, containerPort: 8080, protocol: TCP}
      securityContext:
        {{- include "ngd.containerSecurityContext" . | nindent 8 }}
      resources:
        {{- toYaml $head.resources | nindent 8 }}
  volumes:
    {{- include "ngd.rayVolumes" (dict "root" . "part" $head) | nindent 4 }}
{{- end -}}

{{- define "ngd.rayWorkerPod" -}}
{{- $root := .root -}}
{{- $group := .group -}}
metadata:
  labels:
    {{- include "ngd.rayPodLabels" (dict "root" $root "component" "ray-worker") | nindent 4 }}
    {{- with $group.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (dict) (default dict $group.annotations) (include "ngd.doNotDisrupt" $group.doNotDisrupt | fromYaml) }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "ngd.rayPodCommon" (dict "root" $root "place" (dict "nodeSelector" $group.nodeSelector "priorityClassName" $group.priorityClassName "tolerations" (include "ngd.workerTolerations" $group | fromYamlArray))) | nindent 2 }}
  automountServiceAccountToken: false
  hostNetwork: {{ $group.hostNetwork }}
  terminationGracePeriodSeconds: {{ int $group.terminationGracePeriodSeconds }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "ngd.workerAffinity" . }}
  affinity:
    {{- . | nindent 4 }}
  {{- end }}
  {{- include "ngd.rayExtras" (dict "root" $root "part" $group) | nindent 2 }}
  containers:
    - name: ray-worker
      {{- include "ngd.rayContainer" (dict "root" $root "part" $group) | nindent 6 }}
      {{- /* Jobs leave a node that Ray drains, with a checkpoint, and the container ends when none is left on it. */}}
      {{- $notice := sub (int $group.terminationGracePeriodSeconds) 5 | max 1 }}
      lifecycle:
        preStop:
          exec:
            command:
              - /bin/sh
              - -c
              - >-
                ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "its pod is deleted"
                --deadline-remaining-seconds {{ $notice }};
                sleep {{ $notice }}
      ports:
        - {name: metrics, containerPort: 8080, protocol: TCP}
      securityContext:
        {{- include "ngd.containerSecurityContext" $root | nindent 8 }}
        {{- if and $group.rdma.enabled $group.rdma.ipcLock }}
          add: [IPC_LOCK]
        {{- end }}
      resources:
        {{- include "ngd.workerResources" $group | nindent 8 }}
  volumes:
    {{- include "ngd.rayVolumes" (dict "root" $root "part" $group) | nindent 4 }}
{{- end -}}

{{/* What head and workers share. */}}
{{- define "ngd.rayPodCommon" -}}
{{- $root := .root -}}
enableServiceLinks: false
{{- with include "ngd.pullSecrets" $root }}
{{- . | nindent 0 }}
{{- end }}
securityContext:
  {{- include "ngd.podSecurityContext" $root | nindent 2 }}
{{- with $root.Values.rayCluster.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with $root.Values.rayCluster.schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .place.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .place.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .place.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What the values may add to the pod of the head or of a group. */}}
{{- define "ngd.rayExtras" -}}
{{- with .part.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.initContainers }}
initContainers:
  {{- range . }}
  {{- $given := default dict .securityContext }}
  {{- $secured := deepCopy $given }}
  {{- range $field, $value := include "ngd.containerSecurityContext" $.root | fromYaml }}
  {{- if not (hasKey $given $field) }}{{ $secured = set $secured $field $value }}{{ end }}
  {{- end }}
  {{- toYaml (list (set (deepCopy .) "securityContext" $secured)) | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The container of the head or of a group. A variable's value is a text, or where it comes from. */}}
{{- define "ngd.rayContainer" -}}
{{- $root := .root -}}
image: {{ include "ngd.workerImage" $root }}
imagePullPolicy: {{ $root.Values.workerImage.pullPolicy }}
env:
  - {name: HOME, value: /tmp}
  {{- range $name, $value := merge (dict) (default dict .part.env) (default dict $root.Values.rayCluster.env) }}
  {{- if kindIs "map" $value }}
  - {name: {{ $name }}, valueFrom: {{ toJson $value }}}
  {{- else }}
  - {name: {{ $name }}, value: {{ $value | toString | quote }}}
  {{- end }}
  {{- end }}
{{- with .part.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: runs, mountPath: /var/lib/ngd/runs}
  {{- if $root.Values.storage.data.existingClaim }}
  - {name: data, mountPath: /var/lib/ngd/data, readOnly: true}
  {{- end }}
  {{- if $root.Values.storage.secrets.existingSecret }}
  - {name: job-secrets, mountPath: /etc/ngd/job-secrets, readOnly: true}
  {{- end }}
  {{- with .part.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* KubeRay adds /dev/shm. */}}
{{- define "ngd.rayVolumes" -}}
- name: tmp
  emptyDir: {}
- name: runs
  persistentVolumeClaim: {claimName: {{ include "ngd.runsClaim" .root }}}
{{- with .root.Values.storage.data.existingClaim }}
- name: data
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- with .root.Values.storage.secrets.existingSecret }}
- name: job-secrets
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- with .part.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ngd.workerTolerations" -}}
{{- $tolerations := deepCopy .tolerations -}}
{{- if gt (int .gpusPerPod) 0 -}}
{{- $tolerations = append $tolerations (dict "key" .gpuResource "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- toYaml $tolerations -}}
{{- end -}}

{{/* Extended resources count as requests when they stand in limits. */}}
{{- define "ngd.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- $limits := default dict $resources.limits -}}
{{- if gt (int .gpusPerPod) 0 -}}{{- $limits = set $limits .gpuResource (int .gpusPerPod) -}}{{- end -}}
{{- if .rdma.enabled -}}{{- $limits = set $limits .rdma.resource 1 -}}{{- end -}}
{{- $limits = merge $limits .hugepages -}}
{{- $resources = set $resources "limits" $limits -}}
{{- if .resourceClaims -}}
{{- $claims := list -}}
{{- range .resourceClaims -}}{{- $claims = append $claims (dict "name" .name) -}}{{- end -}}
{{- $resources = set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Workers near each other. Those of one cluster, where Kubernetes can say so in a template (1.31). */}}
{{- define "ngd.workerAffinity" -}}
{{- $root := .root -}}
{{- $affinity := deepCopy .group.affinity -}}
{{- $pack := .group.pack -}}
{{- if and (ne $pack.mode "off") (not $affinity.podAffinity) -}}
{{- $term := dict "topologyKey" $pack.topologyKey "labelSelector" (dict "matchLabels" (include "ngd.rayPodLabels" (dict "root" $root "component" "ray-worker") | fromYaml)) -}}
{{- if semverCompare ">=1.31.0-0" $root.Capabilities.KubeVersion.Version -}}
{{- $term = set $term "matchLabelKeys" (list "ray.io/cluster") -}}
{{- end -}}
{{- if eq $pack.mode "required" -}}
{{- $affinity = set $affinity "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) -}}
{{- else -}}
{{- $affinity = set $affinity "podAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list (dict "weight" 100 "podAffinityTerm" $term))) -}}
{{- end -}}
{{- end -}}
{{- with $affinity -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{/* The RayJob of an attempt, but for what the controller sets: name, labels, entrypoint, submission, number of workers. */}}
{{- define "ngd.rayJobTemplate" -}}
{{- if eq .Values.dispatcher.mode "kuberay" -}}
apiVersion: ray.io/v1
kind: RayJob
metadata:
  labels:
    app.kubernetes.io/part-of: ngd
    app.kubernetes.io/instance: {{ .Release.Name }}
    {{- with merge (dict) .Values.rayCluster.labels .Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (dict) .Values.rayCluster.annotations .Values.commonAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  ttlSecondsAfterFinished: {{ int .Values.dispatcher.kuberay.ttlSecondsAfterFinished }}
  rayClusterSpec:
    {{- include "ngd.rayClusterSpec" . | nindent 4 }}
{{- end -}}
{{- end -}}
