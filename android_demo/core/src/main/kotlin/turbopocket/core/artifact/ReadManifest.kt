// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.artifact

import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.booleanOrNull
import kotlinx.serialization.json.doubleOrNull
import kotlinx.serialization.json.intOrNull
import turbopocket.core.refuse
import java.io.File

private val json = Json { classDiscriminator = "kind" }
private val sha256Digits = Regex("[0-9a-f]{64}")
private val numberTypes = setOf("float32", "float16", "int64", "int32", "uint8", "int8", "bool")

/** The most bytes of a manifest that are read: a hundred times a large model's. */
private const val MOST_BYTES = 64L shl 20

/** As Python's MOST_PIXELS_ASIDE. */
private const val MOST_PIXELS_ASIDE = 16_384

/** The manifest in [folder]. Throws Refused for none, broken JSON, another schema, and what contradicts itself. */
fun readManifest(folder: File): Manifest {
    val path = File(folder, MANIFEST_NAME)
    if (!path.isFile) refuse("$folder is not an artifact: it holds no $MANIFEST_NAME")
    if (path.length() > MOST_BYTES) refuse("$path has ${path.length()} bytes; at most $MOST_BYTES are read")
    val text = path.readText()
    try {
        val found = json.parseToJsonElement(text)
        requireSchema(found)
        return json.decodeFromJsonElement(Manifest.serializer(), found).also(::requireConsistent)
    } catch (error: SerializationException) {
        refuse("$path: ${error.message?.lineSequence()?.first()}")
    } catch (error: IllegalArgumentException) {
        refuse("$path: ${error.message?.lineSequence()?.first()}")
    } catch (error: StackOverflowError) {
        refuse("$path is nested too deep")
    }
}

private fun requireSchema(found: JsonElement) {
    val version = (found as? JsonObject)?.get("schema_version")
    val number = (version as? JsonPrimitive)?.takeUnless { it.isString }?.intOrNull
    if (number != SCHEMA_VERSION) {
        val hint = if (number != null && number > SCHEMA_VERSION) ": a newer turbopocket wrote it" else ""
        refuse("$MANIFEST_NAME has schema_version $version; this app reads $SCHEMA_VERSION$hint")
    }
}

private fun requireConsistent(manifest: Manifest) {
    requireFiles(manifest)
    requirePipeline(manifest)
    requireImage(manifest)
    for ((name, spec) in manifest.components) {
        for (tensor in spec.inputs + spec.outputs) {
            if (tensor.dtype !in numberTypes) refuse("$name: ${tensor.name} is of numbers of type ${tensor.dtype}")
        }
    }
    for ((index, row) in manifest.samplerTable?.rows.orEmpty().withIndex()) {
        if (row.steps.isEmpty()) refuse("sampler_table: row $index has no steps")
        val bounded = row.steps.any { Operand.ESTIMATE in it.next || Operand.ESTIMATE in it.remember.orEmpty() }
        if (bounded && (row.estimate == null || manifest.samplerTable?.bound == null)) {
            refuse("sampler_table: row $index adds an estimate, and there is none with a bound")
        }
    }
}

private fun requireFiles(manifest: Manifest) {
    val listed = manifest.files.map { it.path }
    for (entry in manifest.files) {
        if (!staysInside(entry.path)) refuse("path '${entry.path}' is not a plain relative path inside the artifact")
        if (entry.bytes < 0 || !sha256Digits.matches(entry.sha256)) refuse("${entry.path}: no length and SHA-256")
    }
    listed.groupBy { it }.values.find { it.size > 1 }?.let { refuse("files lists ${it[0]} more than once") }
    if (MANIFEST_NAME in listed) refuse("files lists $MANIFEST_NAME, which cannot hold its own hash")
    val used = manifest.components.values.flatMap { listOfNotNull(it.file, it.data) } +
        manifest.tokenizers.values.map { "$it/tokenizer.json" } +
        listOfNotNull(manifest.selfCheck?.latents?.file, manifest.selfCheck?.picture?.file)
    used.find { it !in listed }?.let { refuse("$it is used but not in files") }
}

/** Whether a path is relative, normal, and cannot leave the folder. */
internal fun staysInside(path: String): Boolean =
    path.isNotEmpty() && path.none { it == '\\' || it == ':' || it == '\u0000' } &&
        path.split('/').all { it.isNotEmpty() && it != "." && it != ".." }

private fun requirePipeline(manifest: Manifest) {
    val pipeline = manifest.pipeline
    pipeline.textEncoders.keys.find { it !in manifest.tokenizers }?.let { refuse("text encoder $it has no tokenizer") }
    val asked = pipeline.denoiser
    requireOneOf("without_prompt", pipeline.withoutPrompt, "zeros", "empty prompt")
    requireOneOf("channels", asked.channels, "all", "first half")
    for ((component, encoder) in pipeline.textEncoders) {
        manifest.requireInput(component, encoder.ids)
        encoder.attentionMask?.let { manifest.requireInput(component, it) }
    }
    for (name in listOf(asked.latents, asked.timestep) + asked.inputs.keys) manifest.requireInput(asked.component, name)
    manifest.requireOutput(asked.component, asked.output)
    manifest.requireInput(pipeline.decoder.component, pipeline.decoder.latents)
    manifest.requireOutput(pipeline.decoder.component, pipeline.decoder.output)
    for (feed in asked.inputs.values) requireFeed(manifest, feed)
    val fed = asked.inputs.keys + asked.latents + asked.timestep
    manifest.component(asked.component).inputs.find { it.name !in fed }?.let {
        refuse("pipeline does not say what feeds input ${it.name} of ${asked.component}")
    }
}

private fun requireFeed(manifest: Manifest, feed: Feed) {
    when (feed) {
        is TextFeed -> {
            if (feed.join.isEmpty()) refuse("a denoiser's text joins nothing")
            for (each in feed.join) {
                manifest.requireOutput(each.component, each.output)
                if (each.component !in manifest.pipeline.textEncoders) refuse("${each.component} reads no text")
            }
        }
        is MaskFeed -> if (feed.component !in manifest.pipeline.textEncoders) refuse("${feed.component} reads no text")
        is NumbersFeed -> for (value in feed.values) {
            if (value.isString) requireOneOf("numbers", value.content, "height", "width", "aspect_ratio")
            else if (value.doubleOrNull == null) refuse("numbers has $value, which is none")
        }
        is GuidanceFeed -> if (feed.width < 4) refuse("a guidance of width ${feed.width}: 4 is the least")
    }
}

private fun requireImage(manifest: Manifest) {
    val image = manifest.image
    val sides = listOf(image.height, image.width, image.latentHeight, image.latentWidth, image.latentChannels)
    if (sides.any { it < 1 } || image.height % image.latentHeight != 0 || image.width % image.latentWidth != 0) {
        refuse("a picture of ${image.width} x ${image.height} has no whole pixels for each latent position")
    }
    if (manifest.sizes.flatten().any { it > MOST_PIXELS_ASIDE }) {
        refuse("sizes lists ${manifest.sizes}: a side may have $MOST_PIXELS_ASIDE pixels")
    }
    if (!(image.vaeScalingFactor > 0)) refuse("vae_scaling_factor ${image.vaeScalingFactor} is not above 0")
    for (values in listOf(image.latentsMean, image.latentsStd)) {
        if (values != null && values.size != image.latentChannels) refuse("image has not one number a channel")
    }
    if ((image.latentsMean == null) != (image.latentsStd == null)) {
        refuse("latents_mean and latents_std belong together")
    }
    if (manifest.sizes.firstOrNull() != listOf(image.height, image.width)) refuse("sizes does not begin with image's")
    val (rows, columns) = image.height / image.latentHeight to image.width / image.latentWidth
    manifest.sizes.find { it.size != 2 || it.min() < 1 || it[0] % rows != 0 || it[1] % columns != 0 }?.let {
        refuse("sizes lists $it: a latent position has $rows x $columns pixels")
    }
}

private fun requireOneOf(what: String, found: String, vararg allowed: String) {
    if (found !in allowed) refuse("$what is '$found'; known are ${allowed.joinToString()}")
}

/** The spec of a component that the manifest has; Refused for another name. */
fun Manifest.component(name: String): ComponentSpec =
    components[name] ?: refuse("the pipeline names $name, which is not a component")

private fun Manifest.requireInput(component: String, name: String) =
    requireTensor(component, "input", name, component(component).inputs)

private fun Manifest.requireOutput(component: String, name: String) =
    requireTensor(component, "output", name, component(component).outputs)

private fun requireTensor(component: String, side: String, name: String, there: List<TensorSpec>) {
    if (there.none { it.name == name }) {
        refuse("the pipeline names $side $name of $component, which has ${there.joinToString { it.name }}")
    }
}

/** Throws Refused unless the build compared the artifact with PyTorch, and found it equal. */
fun Manifest.requireParity() {
    val parity = parity ?: refuse("$name was never compared with PyTorch: its manifest has no parity")
    if ((parity["passed"] as? JsonPrimitive)?.takeUnless { it.isString }?.booleanOrNull != true) {
        refuse("$name failed its comparison with PyTorch${worstOf(parity)}")
    }
}

/** The component that differed most in lowering, as words; nothing where the manifest has no such numbers. */
private fun worstOf(parity: JsonObject): String {
    val errors = (parity["lowering"] as? JsonObject)?.flatMap { (runtime, components) ->
        (components as? JsonObject).orEmpty().mapNotNull { (component, error) ->
            (error as? JsonPrimitive)?.doubleOrNull?.let { Triple(it, component, runtime) }
        }
    }
    val (error, component, runtime) = errors?.maxByOrNull { it.first } ?: return ""
    return ": $component differs by $error in $runtime"
}
